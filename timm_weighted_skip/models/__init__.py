"""The nets. Importing this registers them in timm."""

from timm_weighted_skip.models import (  # noqa: F401
    adaresnet,
    awm_densenet,
    awm_resnet,
    densenet_cifar,
    resnet_cifar,
    resnet_released,
)

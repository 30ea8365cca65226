"""The model card of a checkpoint directory, made of its config: timm's sections, no number by hand."""

import statistics
from pathlib import Path
from typing import Any

import torch

from timm_weighted_skip.costs import count_costs
from timm_weighted_skip.files import read_json
from timm_weighted_skip.hub.checkpoint import build_net
from timm_weighted_skip.hub.config import Results, accuracy
from timm_weighted_skip.markdown import markdown_table

__all__ = ['model_card']

ADARESNET = """@article{su2024adaresnet,
  author = {Hong Su},
  title = {{AdaResNet}: Enhancing Residual Networks with Dynamic Weight Adjustment for Improved Feature Integration},
  journal = {arXiv preprint arXiv:2408.09958},
  year = {2024}
}"""
AWM = """@article{jung2018residual,
  author = {HyoungHo Jung and Ryong Lee and Sanghwan Lee and Wonjun Hwang},
  title = {Residual Convolutional Neural Network Revisited with Active Weighted Mapping},
  journal = {arXiv preprint arXiv:1811.06878},
  year = {2018}
}"""
TIMM = """@misc{rw2019timm,
  author = {Ross Wightman},
  title = {PyTorch Image Models},
  year = {2019},
  publisher = {GitHub},
  doi = {10.5281/zenodo.4414861},
  howpublished = {\\url{https://github.com/huggingface/pytorch-image-models}}
}"""

CLASSIFY = """import timm_weighted_skip  # registers the architecture
import timm
from PIL import Image

image = Image.open('image.jpg').convert('{mode}')
model = timm.create_model('hf-hub:{repo_id}', pretrained=True).eval()

# the transforms that the net was trained for: resize, normalize
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)

logits = model(transform(image).unsqueeze(0))  # (1, {num_classes})
top_probabilities, top_classes = logits.softmax(dim=1).topk({topk})"""

CLASSIFY_PIXELS = """import timm_weighted_skip  # registers the architecture
import timm
import torch

model = timm.create_model('hf-hub:{repo_id}', pretrained=True).eval()

config = timm.data.resolve_model_data_config(model)
mean, std = (torch.tensor(config[name])[:, None, None] for name in ('mean', 'std'))

pixels = torch.rand({shape})  # from 0 to 1
logits = model((pixels - mean) / std)  # (1, {num_classes})
top_probabilities, top_classes = logits.softmax(dim=1).topk({topk})"""

FEATURES = """import timm_weighted_skip  # registers the architecture
import timm
import torch

model = timm.create_model('hf-hub:{repo_id}', pretrained=True, features_only=True).eval()
for feature in model(torch.randn({shape})):
    print(feature.shape)
{shapes}"""

EMBED = """import timm_weighted_skip  # registers the architecture
import timm
import torch

model = timm.create_model('hf-hub:{repo_id}', pretrained=True, num_classes=0).eval()
images = torch.randn({shape})
embedding = model(images)  # {embedding_shape}"""

EMBED_BEFORE_CLASSIFIER = """

# or with the classifier in place:
features = model.forward_features(images)  # {feature_shape}
embedding = model.forward_head(features, pre_logits=True)  # {embedding_shape}"""


def _block(text: str, language: str = 'python') -> str:
    return f'```{language}\n{text}\n```\n'


def _code(commit: str) -> str:
    return f'`{commit.rstrip("+")}`' + ' with changes' * commit.endswith('+')


def _results_section(results: Results, name: str) -> str:
    rows = {f'**{name}**': results.top1, **results.comparison}
    table = markdown_table(['model', 'top-1'], [[name, accuracy(top1)] for name, top1 in rows.items()])
    return (
        f'Top-1 accuracy in % on the {results.split} split of {results.dataset} after the last of {results.epochs} '
        'epochs: mean ± standard deviation over n trainings, one per seed. The weights here are those of '
        f'seed {results.seed}, with {results.own:.2f} %.\n\n'
        f'{table}\n'
    )


@torch.no_grad()
def model_card(folder: Path, repo_id: str) -> str:
    """Text of the README of a checkpoint directory, made of its `config.json`.

    Args:
        folder: The directory.
        repo_id: The Hub repository that the snippets load.
    """
    from huggingface_hub import EvalResult, ModelCardData

    config = read_json(folder / 'config.json')
    results = Results.from_dict(config['results']) if 'results' in config else None
    classifies = config['num_classes'] > 0
    task = 'image-classification' if classifies else 'image-feature-extraction'
    architecture, cfg, args = config['architecture'], config['pretrained_cfg'], config.get('model_args', {})
    shape = (1, *cfg['input_size'])
    with torch.device('meta'):
        image = torch.empty(shape)
        model = build_net(config, folder / 'config.json').eval()
        stages = build_net(config, folder / 'config.json', features_only=True).eval()(image)
        costs = count_costs(model, image)
        features = model.forward_features(image)  # type: ignore[operator]

    evaluation: dict[str, Any] = {}
    if results:
        same: dict[str, Any] = dict(
            task_type='image-classification',
            dataset_type=results.dataset_id,
            dataset_name=results.dataset,
            dataset_split=results.split,
            metric_type='accuracy',
        )
        measured = {f'top-1 of these weights (seed {results.seed})': results.own}
        if len(results.top1) > 1:
            measured[f'top-1, mean of {len(results.top1)} seeds'] = round(statistics.fmean(results.top1), 2)
        evaluation = dict(
            datasets=[results.dataset_id] if '/' in results.dataset_id else None,
            metrics=['accuracy'],
            model_name=repo_id.split('/')[-1],
            eval_results=[EvalResult(**same, metric_value=value, metric_name=n) for n, value in measured.items()],
        )
    data = ModelCardData(
        library_name='timm',
        license=cfg.get('license'),
        pipeline_tag=task,
        tags=[task, 'timm', 'timm-weighted-skip'],
        **evaluation,
    )

    plain = bool(args.get('plain'))
    weights = 'fixed weights' if args.get('skip_fixed') else 'learned weights'
    papers = {'ada': ADARESNET, 'awm': AWM}
    about = {
        'ada': f'An AdaResNet: the shortcuts of a ResNet have {weights}',
        'awm': 'A net with Active Weighted Mapping: paths are merged with weights that are inferred from each image',
    }
    family = '' if plain else architecture[:3]
    other = 'An image classification net' if classifies else 'An image backbone'
    mode = {1: 'L', 3: 'RGB'}.get(shape[1])  # PIL's, of which other numbers of channels have none
    fill = dict(
        repo_id=repo_id,
        mode=mode,
        num_classes=config['num_classes'],
        topk=min(5, config['num_classes']),
        shape=', '.join(map(str, shape)),
        shapes='\n'.join(f'# torch.Size({list(feature.shape)})' for feature in stages),
        feature_shape=tuple(features.shape),
        embedding_shape=tuple(model.forward_head(features, pre_logits=True).shape),  # type: ignore[operator]
    )
    usage = {
        **({'Image Classification': CLASSIFY if mode else CLASSIFY_PIXELS} if classifies else {}),
        'Feature Map Extraction': FEATURES,
        'Image Embeddings': EMBED + EMBED_BEFORE_CLASSIFIER * classifies,
    }
    parts = [
        f'---\n{data.to_yaml()}\n---\n# Model card for {repo_id.split("/")[-1]}\n',
        f'{about.get(family, other)}. From the package `timm-weighted-skip`, a plugin of '
        '`timm`; `pip install timm-weighted-skip`.\n',
        *([f'{results.description}\n'] if results and results.description else []),
        '## Model Details\n',
        f'- **Model Type:** {"Image classification / feature backbone" if classifies else "Image feature encoder"}\n'
        '- **Model Stats:**\n'
        f'  - Params (M): {costs.params / 1e6:.2f}\n'
        f'  - GMACs: {costs.macs / 1e9:.3f}\n'
        f'  - Activations (M): {costs.activations / 1e6:.2f}\n'
        f'  - Image size: {image.shape[2]} x {image.shape[3]}'
        + (f'\n- **Dataset:** {results.dataset}' if results else '')
        + (
            f'\n- **Recipe:** `{results.recipe}`\n- **Seeds:** {", ".join(map(str, results.seeds))}'
            f'\n- **Code:** {", ".join(map(_code, results.commit.split(", ")))}'
            if results
            else '\n- **Training:** not recorded'
        )
        + '\n',
        '## Model Usage\n' + '\n'.join(f'### {title}\n{_block(code.format(**fill))}' for title, code in usage.items()),
        '## Model Comparison\n'
        + (
            _results_section(results, architecture + ' (plain)' * plain)
            if results
            else 'No measurement of these weights is recorded.\n'
        ),
        '## Citation\n' + '\n'.join(_block(c, 'bibtex') for c in (papers.get(family), TIMM) if c),
    ]
    return '\n'.join(parts)

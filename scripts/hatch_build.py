"""hatchling's build hook: the checkpoint directories of hub_cards as `timm_weighted_skip/checkpoints` in the wheel.

Weights of 10 MB and more stay out; their config goes in, and its folder is called as the Hub repository to load from.
"""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

LARGEST = 10_000_000


class CheckpointsHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == 'editable':
            return  # the checkout's own hub_cards are found
        for config in Path(self.root, 'hub_cards').glob('[!.]*/config.json'):
            for file in (config, config.with_name('model.safetensors')):
                if file.is_file() and file.stat().st_size < LARGEST:
                    build_data['force_include'][str(file)] = (
                        f'timm_weighted_skip/checkpoints/{file.parent.name}/{file.name}'
                    )

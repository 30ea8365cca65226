"""Recipes: their files, and the values that they may have."""

import pytest
import yaml

from timm_weighted_skip.train.recipe import Recipe, list_recipes, load_recipe


def test_an_unknown_recipe_key_names_its_neighbours(tmp_path):
    path = tmp_path / 'mine.yaml'
    path.write_text(yaml.safe_dump({'epochs': 3, 'alternate_freez': 3}))
    with pytest.raises(ValueError, match=r"'alternate_freez' .* alternate_freeze"):
        load_recipe(str(path))
    path.write_text('epochs: [')
    with pytest.raises(ValueError, match='YAML'):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ('name', 'value', 'instead'),
    [
        ('no_aug', 'false', 'true or false'),
        ('amp', 1, 'true or false'),
        ('decay_milestones', 3, 'a list'),
        ('mean', 0.5, 'a list'),
        ('model_kwargs', 3, 'names with values'),
    ],
)
def test_a_recipes_value_of_another_kind_is_refused(name, value, instead):
    with pytest.raises(ValueError, match=f'{name}={value!r} is not allowed; give {instead}'):
        Recipe(**{name: value})


def test_every_recipe_of_this_trainer_loads():
    for name in set(list_recipes()) - {'awm_imagenet'}:
        assert load_recipe(name, epochs=7).epochs == 7

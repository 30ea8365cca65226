"""Recipes: their files, and the values that they may have."""

import pytest
import yaml

from timm_weighted_skip.train.recipe import Recipe, list_recipes, load_recipe, read_yaml, recipe_path


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


def test_yamls_numbers_without_a_point_are_numbers(tmp_path):
    path = tmp_path / 'mine.yaml'
    path.write_text('lr: 1e-3\nopt_eps: 1e-7\nopt_betas: [9e-1, 999e-3]\nmean: [5e-1]\nstd: [1e-1]\n')
    recipe = load_recipe(str(path))
    assert (recipe.lr, recipe.opt_eps, recipe.opt_betas) == (1e-3, 1e-7, [0.9, 0.999])
    assert (recipe.mean, recipe.std) == ([0.5], [0.1])


@pytest.mark.parametrize(
    ('name', 'value', 'why'),
    [
        ('std', ['a'], "std='a' is not a number"),
        ('mean', [float('nan')], r'mean=\[nan\] is not allowed; give finite numbers'),
        ('opt_eps', 'abc', "opt_eps='abc' is not a number"),
        ('opt_eps', -1, r'opt_eps=-1\.0 is not allowed; give a finite number of 0 or more'),
        ('decay_milestones', [4, 2], r'decay_milestones=\[4, 2\] is not allowed; give them in ascending order'),
        ('decay_milestones', ['a', 3], r"decay_milestones=\['a', 3\] is not allowed; give whole numbers"),
        ('opt_betas', [0.9], r'opt_betas=\[0\.9\] is not allowed; give two or more'),
        ('opt', None, 'opt=None is not allowed; give a name'),
        ('seed', 2**32, 'seed=4294967296 is not allowed'),
    ],
)
def test_a_recipes_bad_value_is_refused(name, value, why):
    with pytest.raises(ValueError, match=why):
        Recipe(**{name: value})


def test_every_recipe_of_this_trainer_loads():
    for name in set(list_recipes()) - {'awm_imagenet'}:
        assert load_recipe(name, epochs=7).epochs == 7


SGD = dict(opt='sgd', lr=0.1, momentum=0.9, weight_decay=1e-4, warmup_epochs=0)


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        (
            'awm_cifar',
            dict(SGD, epochs=350, batch_size=128, alternate_freeze=3, sched='multistep', decay_milestones=[151, 251])
            | dict(decay_rate=0.1, pad_crop=4, hflip=0.5),
        ),
        (
            'awm_densenet_cifar',
            dict(SGD, epochs=300, batch_size=64, alternate_freeze=3, sched='multistep', decay_milestones=[151, 226])
            | dict(decay_rate=0.1, pad_crop=4, hflip=0.5),
        ),
        (
            'adaresnet_released',
            dict(epochs=10, batch_size=32, alternate_freeze=0, opt='adam', lr=1e-3, weight_decay=0)
            | dict(sched='step', decay_rate=1, no_aug=True),
        ),
    ],
)
def test_a_recipe_is_its_papers(name, expected):
    recipe = load_recipe(name)
    assert {key: getattr(recipe, key) for key in expected} == expected


def test_the_recipe_for_imagenet_is_the_papers():
    recipe = read_yaml(recipe_path('awm_imagenet'))
    expected = dict(epochs=100, alternate_freeze=3, lr=0.1, weight_decay=1e-4, decay_epochs=30, decay_rate=0.1)
    assert {name: recipe[name] for name in expected} == expected
    assert 8 * recipe['batch_size'] == 256  # of eight devices

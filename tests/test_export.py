"""Compiling, exporting and ONNX: the graph computes what the net computes, for any batch and image size."""

import onnxruntime
import pytest
import timm
import torch
from conftest import randomise
from test_units import trained_gates
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

# As few layers as have every kind of unit: a compiler takes longer with each, and sees nothing new in it.
NETS = {
    'awm_resnet14_cifar': dict(layers=(1, 1, 1)),
    'awm_densenet22_bc_cifar': dict(block_config=(1, 2, 2)),
    'adaresnet18_released': dict(layers=(2, 1, 1, 1)),
    'awm_resnet50': dict(layers=(1, 1, 1, 1)),
}


@pytest.fixture(params=NETS)
def model(request):
    return randomise(trained_gates(request.param, **NETS[request.param])).eval()


@torch.no_grad()
def test_compiles_into_one_graph(model):
    torch.compiler.reset()  # or the nets of other tests count as recompilations of this one
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True, dynamic=True)
    compiled(torch.randn(2, 3, 68, 100))  # which leave more than one pixel at every net's end: torch makes a case of 1
    with torch.compiler.set_stance('fail_on_recompile'):
        for n, height, width in ((3, 100, 132), (4, 132, 68)):
            x = torch.randn(n, 3, height, width)
            torch.testing.assert_close(compiled(x), model(x))


@torch.no_grad()
def test_exports_with_a_dynamic_batch_and_size(model):
    sizes = {0: torch.export.Dim('batch'), 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    program = torch.export.export(model, (torch.randn(2, 3, 68, 100),), dynamic_shapes=(sizes,))
    x = torch.randn(5, 3, 132, 68)
    torch.testing.assert_close(program.module()(x), model(x))


@torch.no_grad()
def test_exports_to_onnx(model, tmp_path):
    path = tmp_path / 'model.onnx'
    batch = torch.export.Dim('batch')
    example = torch.randn(2, 3, 32, 32)
    torch.onnx.export(
        model, (example,), path, dynamo=True, dynamic_shapes=({0: batch},), input_names=['x'], verbose=False
    )
    x = torch.randn(3, 3, 32, 32)
    (y,) = onnxruntime.InferenceSession(path).run(None, {'x': x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x), atol=1e-4, rtol=1e-4)


def test_compiled_training_step_has_the_eager_gradients():
    model = randomise(trained_gates('awm_resnet14_cifar', **NETS['awm_resnet14_cifar'])).double()
    x = torch.randn(4, 3, 32, 32).double()
    model(x).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, backend='aot_eager')(x).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_scripted_net_equals_the_eager_one():
    with timm.layers.set_scriptable(True):
        model = trained_gates('awm_resnet14_cifar').eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


@pytest.mark.parametrize('name', ['awm_densenet22_bc_cifar', 'densenet22_bc_cifar', 'awm_resnet14_cifar'])
def test_fx_extracts_features(name):
    model, x = timm.create_model(name).eval(), torch.randn(2, 3, 32, 32)
    last = get_graph_node_names(model)[1][-1]
    extracted = create_feature_extractor(model, [last])(x)[last]
    torch.testing.assert_close(extracted, model(x))

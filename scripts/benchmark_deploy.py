#!/usr/bin/env python3
"""Time the forms in which nets are deployed on a CPU: AOTInductor, ONNX Runtime, and its int8. One thread.

    scripts/benchmark_deploy.py [--models awm_resnet50 adaresnet50] [--forms aotinductor onnx] [--batch-size 1]

In every form each net runs beside its plain net, alternating in one process. `ratio` is the median over the rounds of a
net's time over the plain net's of the same form and round, with the quartiles in brackets. `error` is the largest
difference from the eager net's output, relative to that output's largest value. The nets have random weights, gates
included, and int8 is calibrated with the images that it is timed on: its time is a trained net's, its error is not.
"""

import argparse
import logging
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import timm
import torch
from benchmark import groups_of, positive, quartiles, several, timed, with_quartiles
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from timm.models import get_pretrained_cfg_value
from torch import nn

import timm_weighted_skip  # noqa: F401  registers our nets
from timm_weighted_skip.layers import Gate, SkipWeight

Form = Callable[[nn.Module, torch.Tensor, Path], Callable[[], torch.Tensor]]


def trained(name: str, size: tuple[int, ...]) -> nn.Module:
    """A net whose branches, weights and running statistics are not at their start."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    for module in model.modules():
        if isinstance(module, Gate):
            nn.init.normal_(module.fc2.weight)
        elif isinstance(module, SkipWeight) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # the last of a block starts at 0
            module.momentum = None  # averages over all images
    with torch.no_grad():
        model.train()(torch.randn(8, *size))
    return model.eval()


def eager(model: nn.Module, x: torch.Tensor, folder: Path) -> Callable[[], torch.Tensor]:
    return lambda: model(x)


def aotinductor(model: nn.Module, x: torch.Tensor, folder: Path) -> Callable[[], torch.Tensor]:
    program = torch.export.export(model, (x,))
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / 'model.pt2'))
    package = torch._inductor.aoti_load_package(path)
    return lambda: package(x)


def _export(model: nn.Module, x: torch.Tensor, folder: Path) -> Path:
    path = folder / 'model.onnx'
    torch.onnx.export(model, (x,), path, dynamo=True, input_names=['x'], external_data=False, verbose=False)
    return path


def _session(path: Path, x: torch.Tensor) -> Callable[[], torch.Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    inputs = {'x': x.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def onnx(model: nn.Module, x: torch.Tensor, folder: Path) -> Callable[[], torch.Tensor]:
    return _session(_export(model, x, folder), x)


def int8(model: nn.Module, x: torch.Tensor, folder: Path) -> Callable[[], torch.Tensor]:
    class Images(CalibrationDataReader):
        batches = iter([{'x': x.numpy()}])

        def get_next(self):
            return next(self.batches, None)

    prepared, quantized = folder / 'prepared.onnx', folder / 'int8.onnx'
    quant_pre_process(_export(model, x, folder), prepared, skip_symbolic_shape=True)
    # weights of 7 bits: CPUs without VNNI add products in 16 bits, which whole int8 weights overflow
    quantize_static(prepared, quantized, Images(), per_channel=True, reduce_range=True)
    return _session(quantized, x)


FORMS: dict[str, Form] = {'eager': eager, 'aotinductor': aotinductor, 'onnx': onnx, 'int8': int8}


def compare(form: str, names: list[str], args: argparse.Namespace) -> list[str]:
    """Rows of Markdown for the nets of one backbone in one form; the first is the plain one."""
    runs: dict[str, Callable[[], torch.Tensor]] = {}
    errors: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for name in names}
    size: Any = get_pretrained_cfg_value(names[0], 'input_size')
    for name in names:
        model, x = trained(name, size), torch.randn(args.batch_size, *size)
        with tempfile.TemporaryDirectory() as folder:
            runs[name] = FORMS[form](model, x, Path(folder))
        expected = model(x)
        errors[name] = ((runs[name]() - expected).abs().max() / expected.abs().max()).item()
    for i in range(args.rounds + args.warmup):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(timed(runs[name], torch.device('cpu')))
    rows = []
    for name in names:
        pairs = list(zip(times[name], times[names[0]]))[args.warmup :]
        ratio = with_quartiles(quartiles([own / plain for own, plain in pairs]))
        ms = statistics.median(own for own, _ in pairs)
        rows.append(f'| {form} | {name} | {ms:.1f} | {ratio} | {errors[name]:.1e} |')
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', metavar='NAME', default=['awm_resnet50', 'adaresnet50'])
    parser.add_argument('--forms', nargs='+', choices=FORMS, default=list(FORMS))
    parser.add_argument('--batch-size', type=positive, default=1)
    parser.add_argument('--rounds', type=several, default=21, help='2 or more')
    parser.add_argument('--warmup', type=positive, default=3)
    args = parser.parse_args()
    groups = groups_of(args.models, parser)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # the exporters' and the quantizer's advice
    print('| form | model | ms | ratio | error |\n| --- | --- | ---: | ---: | ---: |')
    with torch.no_grad():
        for form in args.forms:
            for names in groups:
                print('\n'.join(compare(form, names, args)), flush=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())

"""The parameter shapes of two well-known networks."""

from __future__ import annotations

Shapes = list[tuple[int, ...]]


def resnet50() -> Shapes:
    """The 161 parameters of ResNet-50 (He et al. 2015), 25.6M elements: two thirds of the tensors are tiny."""

    def conv_bn(out: int, inp: int, kernel: int) -> Shapes:
        return [(out, inp, kernel, kernel), (out,), (out,)]

    shapes = conv_bn(64, 3, 7)
    inp = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += conv_bn(width, inp, 1) + conv_bn(width, width, 3) + conv_bn(4 * width, width, 1)
            if block == 0:
                shapes += conv_bn(4 * width, inp, 1)
            inp = 4 * width
    return [*shapes, (1000, inp), (1000,)]


def gpt2_small() -> Shapes:
    """The 148 parameters of GPT-2 small (Radford et al. 2019), 124.4M elements."""
    norm: Shapes = [(768,), (768,)]
    attention: Shapes = [(768, 2304), (2304,), (768, 768), (768,)]
    mlp: Shapes = [(768, 3072), (3072,), (3072, 768), (768,)]
    return [(50257, 768), (1024, 768), *(norm + attention + norm + mlp) * 12, *norm]

"""Forwards of blocks whose neighbouring modules run in one pass: norm and activation, dropout, residual and norm.

Each computes what its block's own forward does. Where a module inside is not what the fused kernel stands for (it has hooks,
or was exchanged), that module is called as usual. `fuses` is for the report.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .activations import slope_of
from .neighbours import dropout_add_norm, is_batch_norm, norm_act
from .probe import Inputs
from .swap import original_class


@dataclass(frozen=True)
class Sequential:
    """torch.nn.Sequential: BatchNorm and the ReLU behind it."""

    fuses: ClassVar[str] = "BatchNorm + ReLU"
    arity: ClassVar[int] = 1
    takes_options: ClassVar[bool] = False

    def __call__(self, module: Any, input: Any) -> Any:
        layers = list(module)
        at = 0
        while at < len(layers):
            following = layers[at + 1] if at + 1 < len(layers) else None
            if is_batch_norm(layers[at]) and following is not None and slope_of(following) is not None:
                input = norm_act(layers[at], following, input)
                at += 2
            else:
                input = layers[at](input)
                at += 1
        return input

    @staticmethod
    def candidates(module: Any) -> Iterator[Sequential]:
        layers = list(module)
        for norm, activation in itertools.pairwise(layers):
            if is_batch_norm(norm) and slope_of(activation) is not None:
                yield Sequential()
                return


@dataclass(frozen=True)
class ResidualBlock:
    """The blocks of ResNets, torchvision's and timm's: BatchNorm and ReLU; the last pair has the residual added between them."""

    convolutions: int

    fuses: ClassVar[str] = "BatchNorm + ReLU, BatchNorm + residual + ReLU"
    arity: ClassVar[int] = 1
    takes_options: ClassVar[bool] = False

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        if not self._fits(module):
            y: Tensor = original_class(module).forward(module, x)
            return y
        residual, last = x, self.convolutions
        for i in range(1, last):
            x = norm_act(getattr(module, f"bn{i}"), self._activation(module, i), getattr(module, f"conv{i}")(x))
        x = getattr(module, f"conv{last}")(x)
        if module.downsample is not None:
            residual = module.downsample(residual)
        return norm_act(getattr(module, f"bn{last}"), self._activation(module, last), x, residual)

    @staticmethod
    def _activation(module: Any, i: int) -> nn.Module:
        found: nn.Module = module.relu if hasattr(module, "relu") else getattr(module, f"act{i}")
        return found

    @staticmethod
    def _fits(module: Any) -> bool:
        """Whether timm has put nothing between a convolution, its norm, and the residual."""
        between = (getattr(module, name, None) for name in ("se", "drop_path", "drop_block", "aa"))
        return all(part is None or type(part) is nn.Identity for part in between)

    @classmethod
    def candidates(cls, module: Any) -> Iterator[ResidualBlock]:
        names = {name for name, _ in module.named_children()}
        count = 3 if "conv3" in names else 2
        needed = {f"{part}{i}" for i in range(1, count + 1) for part in ("conv", "bn")}
        activations = {"relu"} if "relu" in names else {f"act{i}" for i in range(1, count + 1)}
        if needed | activations <= names and hasattr(module, "downsample") and cls._fits(module):
            yield cls(count)

    def inputs(self, module: Any) -> list[Inputs]:
        return [Inputs((torch.empty(2, module.conv1.in_channels, 4, 4),))]


# Methods of torch's layers that some replace on the instance, to see what attention computes.
_PARTS = "_sa_block", "_mha_block", "_ff_block"


def _has_own_parts(module: nn.Module) -> bool:
    return any(part in module.__dict__ for part in _PARTS)


@dataclass(frozen=True)
class EncoderLayer:
    """torch.nn.TransformerEncoderLayer in training; torch has a fast path of its own for evaluation."""

    fuses: ClassVar[str] = "dropout + residual + LayerNorm"
    arity: ClassVar[int] = 1
    takes_options: ClassVar[bool] = True

    def __call__(
        self,
        module: Any,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if not module.training or _has_own_parts(module):
            own: Tensor = original_class(module).forward(module, src, src_mask, src_key_padding_mask, is_causal)
            return own
        attention = {"attn_mask": src_mask, "key_padding_mask": src_key_padding_mask, "is_causal": is_causal}
        x, first = src, module.norm_first
        h = module.norm1(x) if first else x
        h = module.self_attn(h, h, h, need_weights=False, **attention)[0]
        y, x = dropout_add_norm(module.dropout1, module.norm2 if first else module.norm1, h, x)
        x = x if first else y
        h = module.linear2(module.dropout(module.activation(module.linear1(y))))
        if first:
            return x + module.dropout2(h)  # type: ignore[no-any-return]
        return dropout_add_norm(module.dropout2, module.norm2, h, x)[0]

    @staticmethod
    def candidates(module: Any) -> Iterator[EncoderLayer]:
        yield EncoderLayer()


@dataclass(frozen=True)
class DecoderLayer:
    """torch.nn.TransformerDecoderLayer."""

    fuses: ClassVar[str] = "dropout + residual + LayerNorm"
    arity: ClassVar[int] = 2
    takes_options: ClassVar[bool] = True

    def __call__(
        self,
        module: Any,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        if _has_own_parts(module):
            masks = (
                tgt_mask,
                memory_mask,
                tgt_key_padding_mask,
                memory_key_padding_mask,
                tgt_is_causal,
                memory_is_causal,
            )
            result: Tensor = original_class(module).forward(module, tgt, memory, *masks)
            return result
        own = {"attn_mask": tgt_mask, "key_padding_mask": tgt_key_padding_mask, "is_causal": tgt_is_causal}
        other = {"attn_mask": memory_mask, "key_padding_mask": memory_key_padding_mask, "is_causal": memory_is_causal}
        x, first = tgt, module.norm_first
        h = module.norm1(x) if first else x
        h = module.self_attn(h, h, h, need_weights=False, **own)[0]
        y, x = dropout_add_norm(module.dropout1, module.norm2 if first else module.norm1, h, x)
        x = x if first else y
        h = module.multihead_attn(y, memory, memory, need_weights=False, **other)[0]
        y, x = dropout_add_norm(module.dropout2, module.norm3 if first else module.norm2, h, x)
        x = x if first else y
        h = module.linear2(module.dropout(module.activation(module.linear1(y))))
        if first:
            return x + module.dropout3(h)  # type: ignore[no-any-return]
        return dropout_add_norm(module.dropout3, module.norm3, h, x)[0]

    @staticmethod
    def candidates(module: Any) -> Iterator[DecoderLayer]:
        yield DecoderLayer()


@dataclass(frozen=True)
class DenseDropoutAddNorm:
    """LayerNorm(dropout(dense(h)) + residual): the outputs of BERT and its relatives."""

    fuses: ClassVar[str] = "dropout + residual + LayerNorm"
    arity: ClassVar[int] = 2
    takes_options: ClassVar[bool] = False

    def __call__(self, module: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        h = module.dense(hidden_states)
        return dropout_add_norm(module.dropout, module.LayerNorm, h, input_tensor)[0]

    @staticmethod
    def candidates(module: Any) -> Iterator[DenseDropoutAddNorm]:
        if {name for name, _ in module.named_children()} == {"dense", "dropout", "LayerNorm"}:
            yield DenseDropoutAddNorm()

    def inputs(self, module: Any) -> list[Inputs]:
        dense = module.dense
        return [Inputs((torch.empty(2, 5, dense.in_features), torch.empty(2, 5, dense.out_features)))]


@dataclass(frozen=True)
class VisionBlock:
    """x + attention(norm1(x)), then x + mlp(norm2(x)): timm's Block, without layer scales and dropped paths."""

    fuses: ClassVar[str] = "residual + norm"
    arity: ClassVar[int] = 1
    takes_options: ClassVar[bool] = False

    def __call__(self, module: Any, x: Tensor) -> Tensor:
        if not self._fits(module):
            own: Tensor = original_class(module).forward(module, x)
            return own
        h, x = dropout_add_norm(None, module.norm2, module.attn(module.norm1(x)), x)
        y: Tensor = x + module.mlp(h)
        return y

    @staticmethod
    def _fits(module: Any) -> bool:
        return all(type(getattr(module, name)) is nn.Identity for name in ("ls1", "ls2", "drop_path1", "drop_path2"))

    @classmethod
    def candidates(cls, module: Any) -> Iterator[VisionBlock]:
        needed = {"norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}
        if {name for name, _ in module.named_children()} == needed and cls._fits(module):
            yield cls()

    def inputs(self, module: Any) -> list[Inputs]:
        return [Inputs((torch.empty(2, 5, module.norm1.weight.numel()),))]


@dataclass(frozen=True)
class VisionLayer:
    """As VisionBlock, with a dropout after each part: the layers of transformers' ViT and its relatives."""

    fuses: ClassVar[str] = "dropout + residual + LayerNorm"
    arity: ClassVar[int] = 1
    takes_options: ClassVar[bool] = False

    def __call__(self, module: Any, hidden_states: Tensor) -> Tensor:
        h, *_ = module.attention(module.layernorm_before(hidden_states))
        h, x = dropout_add_norm(module.dropout, module.layernorm_after, h, hidden_states)
        y: Tensor = module.dropout(module.mlp(h)) + x
        return y

    @staticmethod
    def candidates(module: Any) -> Iterator[VisionLayer]:
        if {name for name, _ in module.named_children()} == {
            "attention",
            "layernorm_before",
            "layernorm_after",
            "mlp",
            "dropout",
        }:
            yield VisionLayer()

    def inputs(self, module: Any) -> list[Inputs]:
        return [Inputs((torch.empty(2, 5, module.layernorm_before.weight.numel()),))]


@dataclass(frozen=True)
class DecoderBlock:
    """x + attention(norm(x)), then x + mlp(norm(x)): the layers of Llama, Mistral, Qwen and their relatives."""

    fuses: ClassVar[str] = "residual + norm"
    arity: ClassVar[int] = 1
    takes_options: ClassVar[bool] = True

    def __call__(self, module: Any, hidden_states: Tensor, **options: Any) -> Tensor:
        options.setdefault("attention_mask", None)
        h, _ = module.self_attn(hidden_states=module.input_layernorm(hidden_states), **options)
        h, x = dropout_add_norm(None, module.post_attention_layernorm, h, hidden_states)
        y: Tensor = x + module.mlp(h)
        return y

    @staticmethod
    def candidates(module: Any) -> Iterator[DecoderBlock]:
        needed = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
        if {name for name, _ in module.named_children()} == needed and hasattr(module.self_attn, "head_dim"):
            yield DecoderBlock()

    def inputs(self, module: Any) -> list[Inputs]:
        angles = torch.empty(2, 5, module.self_attn.head_dim)
        hidden_states = torch.empty(2, 5, module.input_layernorm.weight.numel())
        return [Inputs((hidden_states,), {"position_embeddings": (angles, angles)})]


# Classes of torch whose forward is known; everything else is recognised by its children, and compared.
OF_TORCH: dict[type[nn.Module], Any] = {
    nn.Sequential: Sequential,
    nn.TransformerEncoderLayer: EncoderLayer,
    nn.TransformerDecoderLayer: DecoderLayer,
}
OF_OTHERS = (ResidualBlock, DenseDropoutAddNorm, VisionBlock, VisionLayer, DecoderBlock)

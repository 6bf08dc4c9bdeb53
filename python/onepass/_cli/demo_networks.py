"""The networks of the demo, in torch alone."""

from __future__ import annotations

from torch import Tensor, nn


# tanh, not ReLU, because it has no kink. With ReLU a unit that is +1e-8 in one run and -1e-8 in the other is a visible
# jump, and the curves of any two optimizers that round differently, torch's own included, part after some hundred steps.
def cnn() -> nn.Module:
    def block(inp: int, out: int) -> list[nn.Module]:
        return [nn.Conv2d(inp, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.Tanh()]

    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        *(*block(1, 16), *block(16, 16), nn.AvgPool2d(2)),
        *(*block(16, 32), *block(32, 32), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.1), nn.Linear(32 * 2 * 2, 10)),
    )


def character_mlp(characters: int, context: int, width: int = 128) -> nn.Module:
    """Predicts the character that follows a text of `context` characters."""
    hidden = [layer for _ in range(3) for layer in (nn.Linear(width, width), nn.Tanh())]
    return nn.Sequential(
        *(nn.Embedding(characters, 16), nn.Flatten(), nn.Linear(16 * context, width), nn.Tanh()),
        *(*hidden, nn.Linear(width, characters)),
    )


class Block(nn.Module):
    """A pre-norm transformer block: it normalises before attention and before its two-layer network."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.network = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop1, self.drop2 = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attend(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop1(self.project(mixed.transpose(1, 2).flatten(2)))
        result: Tensor = x + self.drop2(self.network(self.norm2(x)))
        return result


class CharacterGPT(nn.Module):
    """Predicts the next character at each position of a text of at most `context` characters."""

    def __init__(self, characters: int, context: int, width: int = 64, layers: int = 2, dropout: float = 0.1) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(characters, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, 4, dropout) for _ in range(layers)))
        self.drop, self.norm = nn.Dropout(dropout), nn.LayerNorm(width)
        self.head = nn.Linear(width, characters, bias=False)
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        x = self.characters(text) + self.positions.weight[: text.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(self.drop(x))))
        flat: Tensor = logits.flatten(0, 1)
        return flat

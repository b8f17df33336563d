"""Sizes of a Llama-architecture model, read from its config.json alone, without loading torch or Transformers."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from nybble.errors import ModelError

REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
POSITIONS = 2048  # the default if config.json does not say, as in Transformers


class Projection(NamedTuple):
    """Sizes of a linear layer."""

    inputs: int
    outputs: int

    @property
    def parameters(self) -> int:
        """Parameters of its weight, without a bias."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Parameters:
    """A model's parameters, counted by kind."""

    linears: int
    """Weights of the decoder layers' projections, which are quantised."""
    biases: int
    norms: int
    embedding: int
    head: int
    """0 if the head is tied to the embedding."""

    @property
    def total(self) -> int:
        """The sum of all; tied weights count once."""
        return self.linears + self.biases + self.norms + self.embedding + self.head


def head_size(config: Mapping[str, Any]) -> int:
    """Size of an attention head: `head_dim`, or `hidden_size // num_attention_heads` if that is missing or null."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a whole model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    vocabulary: int
    positions: int
    tied: bool = False
    """Whether the head is tied to the embedding."""
    attention_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelShape:
        """Read a config.json or `PretrainedConfig.to_dict()`; `model.base.fields` checks that the values make a valid model.

        Raises:
            ModelError: fields are missing.
        """
        if missing := [name for name in REQUIRED if config.get(name) is None]:
            raise ModelError(
                f"config.json has no {', '.join(missing)}", fix="compare it with config.json on the model's page"
            )
        heads = config["num_attention_heads"]
        return cls(
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            key_value_heads=config.get("num_key_value_heads") or heads,
            head_size=head_size(config),
            vocabulary=config["vocab_size"],
            positions=config.get("max_position_embeddings") or POSITIONS,
            tied=bool(config.get("tie_word_embeddings")),
            attention_bias=bool(config.get("attention_bias")),
            mlp_bias=bool(config.get("mlp_bias")),
        )

    @property
    def projections(self) -> Mapping[str, Projection]:
        """The linear layers of one decoder layer, by name."""
        queries, keys = self.heads * self.head_size, self.key_value_heads * self.head_size
        return {
            "q_proj": Projection(self.hidden, queries),
            "k_proj": Projection(self.hidden, keys),
            "v_proj": Projection(self.hidden, keys),
            "o_proj": Projection(queries, self.hidden),
            "gate_proj": Projection(self.hidden, self.intermediate),
            "up_proj": Projection(self.hidden, self.intermediate),
            "down_proj": Projection(self.intermediate, self.hidden),
        }

    @property
    def parameters(self) -> Parameters:
        """The whole model's parameters, by kind."""
        projections = self.projections
        embedding = self.vocabulary * self.hidden
        return Parameters(
            linears=self.layers * sum(projection.parameters for projection in projections.values()),
            biases=self.layers * sum(projections[name].outputs for name in self._biased),
            norms=(2 * self.layers + 1) * self.hidden,
            embedding=embedding,
            head=0 if self.tied else embedding,
        )

    @property
    def _biased(self) -> Collection[str]:
        attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
        return (*(attention if self.attention_bias else ()), *(mlp if self.mlp_bias else ()))

    def adapter_parameters(self, r: int, targets: Collection[str], *, dora: bool = False) -> int:
        """Parameters of a LoRA.

        Args:
            r: its rank.
            targets: names of `projections`.
            dora: whether each target has DoRA's magnitudes too, one per output.
        """
        targeted = [self.projections[name] for name in targets]
        layer = sum(r * (inputs + outputs) + dora * outputs for inputs, outputs in targeted)
        return self.layers * layer


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a decoder layer with its adapters."""

    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    head_size: int
    ranks: tuple[int, int, int, int]
    """Adapter columns of the groups q-k-v, o, gate-up and down, each rounded up to a multiple of 8."""
    element: int
    """Bytes of a number: 2 for bfloat16 and float16."""
    residual: int
    """Bytes of a number of the residual stream; 4 if norms and embedding were converted to float32."""
    fp8: tuple[bool, ...] = (False,) * 4
    """Which of the groups are computed in fp8."""

    @property
    def query(self) -> int:
        """Outputs of q_proj."""
        return self.heads * self.head_size

    @property
    def qkv(self) -> int:
        """Outputs of q, k and v together."""
        return (self.heads + 2 * self.key_heads) * self.head_size


ALIGNMENT = (
    8  # adapter columns of a group: rows of the workspace start at multiples of 16 bytes, as tensor cores need them
)
GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Projections with one input, which are computed together."""


PATHS = tuple(
    tuple(f"{'mlp' if name in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}.{name}" for name in names)
    for names in GROUPS
)
"""Where each group's projections are in a layer."""


def unskipped(skip: Collection[str], layer: int) -> tuple[bool, ...]:
    """Which of the groups no name leaves out: one projection leaves those with the same input out too.

    Args:
        skip: parts of names of projections or layers: down_proj, layers.0, layers.3.mlp.
        layer: the layer's number.
    """
    return tuple(
        not any(_is_part(name, f"layers.{layer}.{path}") for name in skip for path in paths) for paths in PATHS
    )


class NameFault(NamedTuple):
    """What is wrong with names that leave projections or layers out."""

    what: str
    fix: str


def fault_of_names(skip: Collection[str], layers: int) -> NameFault | None:
    """What is wrong with names in a model of this many layers: they leave out everything, or one of them nothing."""
    every = [f"layers.{layer}.{path}" for layer in range(layers) for paths in PATHS for path in paths]
    if not any(any(unskipped(skip, layer)) for layer in range(layers)):
        return NameFault(f"leaves nothing in fp8: {', '.join(skip)}", 'compute="bf16" (in a recipe: engine.compute)')
    unknown = [name for name in skip if not any(_is_part(name, path) for path in every)]
    names = f"names like down_proj, self_attn, layers.0, layers.{layers - 1}.mlp or layers.0.self_attn.q_proj"
    return NameFault(f"{unknown[0]!r} is no projection and no layer of this model", names) if unknown else None


def _is_part(name: str, path: str) -> bool:
    """Whether a name is part of a path; names may begin as `named_modules` gives them, and a number alone says nothing."""
    name = re.sub(r"^(base_model\.)?(model\.)*", "", name)
    return bool(name) and not name.isdecimal() and f".{name}." in f".{path}."


def layer_shape(
    shape: ModelShape,
    r: int,
    targets: Collection[str],
    *,
    element: int = 2,
    residual: int = 2,
    fp8: tuple[bool, ...] = (False,) * 4,
) -> LayerShape:
    """A decoder layer of a model with LoRA.

    Args:
        shape: the model's sizes.
        r: rank of the adapters.
        targets: names of the projections that have one.
        element: bytes of a number.
        residual: bytes of a number of the residual stream.
        fp8: which of the groups are computed in fp8.
    """
    q, o, g, d = (-(-r * len([name for name in group if name in targets]) // ALIGNMENT) * ALIGNMENT for group in GROUPS)
    return LayerShape(
        shape.hidden,
        shape.intermediate,
        shape.heads,
        shape.key_value_heads,
        shape.head_size,
        (q, o, g, d),
        element,
        residual,
        fp8,
    )


LLAMA_2_7B = ModelShape(4096, 11008, 32, 32, 32, 128, 32000, 4096)

"""Low-rank adapters computed in the model's precision, with trained matrices in float32.

PEFT casts the input of every adapted layer to the adapters' float32, and multiplies, scales and adds there. At
InternVL3-8B's size in bfloat16 that is a third of a training step and most of what the backward pass keeps. The layers
here cast the two small matrices instead, as mixed-precision training does (Micikevicius et al., ICLR 2018, arXiv
1710.03740), and all layers with one input keep it once. Where the input is float32 too, nothing is cast: PEFT's own
forward runs.

PEFT 0.21 has no such layer: `autocast_adapter_dtype=False` trains bfloat16 matrices, and a `LoraVariant` receives an
input that is already cast. These layers enter by its dispatch of custom modules; merging and saving are PEFT's, and so
are adapters of convolutions.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import torch

# The forward pass of a gated MLP; other MLPs are left unchanged.
_GATED = "self.down_proj(self.act_fn(self.gate_proj({0})) * self.up_proj({0}))"


class LowRankUpdate(torch.autograd.Function):
    """y = W x + b + s B A x, or y = base(x) + s B A x where the frozen layer is no plain Linear.

    Saved for the backward pass: x, one tensor shared by all layers that read it, and activations of the adapters' rank.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        down: torch.Tensor,
        up: torch.Tensor,
        scaling: float,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        base: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the layer's output, ``(…, out)``, in the precision of ``x``.

        Args:
            ctx: of autograd.
            x: the input, ``(…, in)``.
            down: A, ``(rank, in)``; A and B may have another precision, which is also that of their gradients.
            up: B, ``(out, rank)``.
            scaling: s.
            weight: W, frozen, ``(out, in)``; None with ``base``.
            bias: b, frozen, ``(out,)``.
            base: output of the frozen layer for ``x``, ``(…, out)``; None with ``weight``.
        """
        rows, a, b = _rows(x), down.to(x.dtype), up.to(x.dtype)
        low = rows @ a.t()
        if base is not None:
            out = torch.addmm(_rows(base), low, b.t(), alpha=scaling)
        else:
            assert weight is not None
            out = torch.nn.functional.linear(rows, weight, bias).addmm_(low, b.t(), alpha=scaling)
        ctx.save_for_backward(x, low, a, b, weight)
        ctx.scaling, ctx.precision = scaling, down.dtype
        return _shaped(out, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Return the gradients of x, A, B and ``base``."""
        x, *saved = ctx.saved_tensors
        of_x, *of_adapters = _gradients(ctx, gradient, x, *saved)
        return of_x, *of_adapters, None, None, None, gradient if ctx.needs_input_grad[6] else None


class GatedLowRankUpdate(torch.autograd.Function):
    """`LowRankUpdate` of x = f(gate) · lift, which keeps the two factors, and makes f(gate) and x again.

    Eager mode keeps gate, f(gate), lift and x, each as wide as the MLP: half of what the backward pass keeps.
    """

    @staticmethod
    def forward(
        ctx: Any,
        gate: torch.Tensor,
        lift: torch.Tensor,
        activation: Callable[[torch.Tensor], torch.Tensor],
        down: torch.Tensor,
        up: torch.Tensor,
        scaling: float,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Return the MLP's output, ``(…, out)``.

        Args:
            ctx: of autograd.
            gate: ``(…, in)``.
            lift: ``(…, in)``.
            activation: f.
            down: as in `LowRankUpdate`, as what follows.
            up: B.
            scaling: s.
            weight: W.
            bias: b.
        """
        x = activation(gate) * lift
        rows, a, b = _rows(x), down.to(x.dtype), up.to(x.dtype)
        low = rows @ a.t()
        out = torch.nn.functional.linear(rows, weight, bias).addmm_(low, b.t(), alpha=scaling)
        ctx.save_for_backward(gate, lift, low, a, b, weight)
        ctx.scaling, ctx.precision, ctx.activation = scaling, down.dtype, activation
        return _shaped(out, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """Return the gradients of gate, lift, A and B."""
        *factors, low, a, b, weight = ctx.saved_tensors
        with torch.enable_grad():
            gate, lift = (factor.detach().requires_grad_() for factor in factors)
            x = ctx.activation(gate) * lift
        of_x, *of_adapters = _gradients(ctx, gradient, x.detach(), low, a, b, weight)
        of_factors = torch.autograd.grad(x, (gate, lift), of_x)
        return *of_factors, None, *of_adapters, None, None, None


def _gradients(
    ctx: Any,
    gradient: torch.Tensor,
    x: torch.Tensor,
    low: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    weight: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Return the gradients of x (through W x as well, with ``weight``), A and B."""
    of_rows = _rows(gradient)
    of_low = _scaled(of_rows, b, ctx.scaling)
    of_down = (of_low.t() @ _rows(x)).to(ctx.precision)
    of_up = _scaled(of_rows.t(), low, ctx.scaling).to(ctx.precision)
    if not ctx.needs_input_grad[0]:
        return None, of_down, of_up
    of_x = of_low @ a if weight is None else (of_rows @ weight).addmm_(of_low, a)
    return of_x.view(x.shape), of_down, of_up


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _shaped(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return rows in the shape of ``x``, as Linear does: no view to autograd, so that models can change it in place."""
    shaped: torch.Tensor = torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], rows.shape[-1]])
    return shaped


def _scaled(left: torch.Tensor, right: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return ``scaling * left @ right`` by one kernel."""
    out = left.new_empty(left.shape[0], right.shape[1])
    return torch.addmm(out, left, right, beta=0, alpha=scaling)


class InComputePrecision:
    """Mixin of PEFT's layers: computes adapters in the input's precision."""

    def forward(self: Any, x: torch.Tensor, *arguments: Any, **more: Any) -> torch.Tensor:
        """Return the adapted layer's output, ``(…, out)``.

        Args:
            x: ``(…, in)``.
            arguments: of PEFT's forward.
            more: of PEFT's forward, such as ``adapter_names``.
        """
        found = None if arguments or more else mixed_adapter(self, x)
        if found is None:
            return super().forward(x, *arguments, **more)  # type: ignore[misc, no-any-return]
        down, up, scaling, dropout = found
        layer, dropped = self.get_base_layer(), dropout(x)
        out: torch.Tensor
        if dropped is x and type(layer) is torch.nn.Linear:
            out = LowRankUpdate.apply(x, down, up, scaling, layer.weight, layer.bias, None)
        else:
            base = layer(x)
            out = LowRankUpdate.apply(dropped.to(base.dtype), down, up, scaling, None, None, base)
        return out


def mixed_adapter(layer: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float, torch.nn.Module] | None:
    """Return A, B, their scaling and dropout; None if PEFT computes the layer.

    That is all but one plain LoRA adapter whose precision is not the input's: several or none, other variants, an
    adapter that is merged or switched off, autocast.

    Args:
        layer: PEFT's.
        x: its input.
    """
    active = layer.active_adapters
    if len(active) != 1 or active[0] not in layer.lora_A or layer.disable_adapters or layer.merged:
        return None
    (name,) = active
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    if down.dtype == x.dtype or layer.lora_variant or layer.lora_bias[name] or torch.is_autocast_enabled():
        return None
    return down, up, layer.scaling[name], layer.lora_dropout[name]


class RecomputedGate:
    """Mixin of gated MLPs: does not save the input of their adapted last layer."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        """Return the MLP's output, ``(…, out)``.

        Args:
            x: ``(…, in)``.
        """
        last = self.down_proj
        found = mixed_adapter(last, x) if isinstance(last, InComputePrecision) else None
        if found is None or type(last.get_base_layer()) is not torch.nn.Linear:
            return super().forward(x)  # type: ignore[misc, no-any-return]
        down, up, scaling, dropout = found
        layer, gate, lift = last.get_base_layer(), self.gate_proj(x), self.up_proj(x)
        drops = dropout.training and getattr(dropout, "p", 0.0) > 0
        out: torch.Tensor
        if drops or not (gate.requires_grad and lift.requires_grad):
            out = last(self.act_fn(gate) * lift)
        else:
            activation = getattr(self.act_fn, "forward", self.act_fn)  # hooks on modules expect no call in backward
            out = GatedLowRankUpdate.apply(gate, lift, activation, down, up, scaling, layer.weight, layer.bias)
        return out


def recompute_gates(network: torch.nn.Module) -> None:
    """Make the gated MLPs of an adapted network save less for the backward pass; others are left unchanged."""
    for module in network.modules():
        kind: Any = type(module)
        if isinstance(getattr(module, "down_proj", None), InComputePrecision) and _is_gated(kind):
            module.__class__ = _recomputing(kind)


@functools.cache
def _recomputing(kind: type) -> type:
    return type(kind.__name__, (RecomputedGate, kind), {})


@functools.cache
def _is_gated(kind: type) -> bool:
    """Return whether a module's forward is the expression above and nothing else."""
    try:
        function: Any = ast.parse(textwrap.dedent(inspect.getsource(kind.forward))).body[0]  # type: ignore[attr-defined]
    except (OSError, TypeError):
        return False
    names = [argument.arg for argument in function.args.args]
    lines = [ast.unparse(line) for line in function.body]
    expression = _GATED.format(names[-1])
    assigned = lines[-1].removeprefix("return ")
    return len(names) == 2 and lines in ([f"return {expression}"], [f"{assigned} = {expression}", lines[-1]])


@functools.cache
def layers(quantized: bool) -> dict[type, type]:
    """Return the mapping for PEFT's dispatch, from frozen to adapting layer classes, quantized ones first if asked."""
    from peft.tuners import lora

    found: dict[type, type] = {}
    if quantized:
        import bitsandbytes
        from peft.tuners.lora import bnb

        for kind in ("Linear4bit", "Linear8bitLt"):
            found[getattr(bitsandbytes.nn, kind)] = type(kind, (InComputePrecision, getattr(bnb, kind)), {})
    found[torch.nn.Linear] = type("Linear", (InComputePrecision, lora.Linear), {})
    return found

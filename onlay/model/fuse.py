"""The fast path: what a base and its adapter compute, by the fused blocks of onlay/kernels, per instance, and everything can be put back.

Nothing is patched globally, and nothing is believed: the base is run once on a few tokens while each layer's arguments and
results are noted; a layer of a known form is then run through the blocks with the same arguments, and takes them only if the
results agree token by token.  Where a whole layer does not, its attention and its MLP are tried by themselves, and every adapted
linear layer that is left becomes one node.  What stays as transformers and PEFT have it is said in the Run, with the reason.

A replaced forward steps aside, call by call, whenever it is asked for something else: a cache, a mask, an adapter that is off,
another precision.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from onlay.kernels.attention_block import AttentionBlock
from onlay.kernels.causal_attention import describe_kernel, has_kernel
from onlay.kernels.linear_block import linear_block
from onlay.kernels.mlp_block import MlpBlock
from onlay.kernels.norm_block import norm_block
from onlay.model.attention import Layout, packed_arguments, watch_attention
from onlay.model.blocks import Adapted, FusedAttention, FusedMlp, adapted_group, examples_of, why_not
from onlay.model.forms import AttentionForm, LayerForm, attention_form, layer_form, mlp_form, norm_of
from onlay.model.recompute import find_layers

if TYPE_CHECKING:
    from onlay.kernels.mlp_block import Norm

PROBE_LENGTHS = (29, 29, 37)
"""Tokens of the examples that the base is tried with."""
UNUSUAL = "it is given masks, or other than rows and rotary tables"
LEAST_EPS = 1e-5
"""Of a wide precision: a layer that computes something else is off by far more, and the same layer in another order of sums by a few
roundings, which must not decide one way today and the other after an interruption."""
SLACK = 8.0
"""Roundings by which a token's result may differ, of what a layer adds and of what it returns."""


@dataclass(slots=True)
class Fused:
    """What is on the fast path."""

    layers: dict[nn.Module, list[MlpBlock | AttentionBlock]] = field(default_factory=dict)
    """The blocks of each of the decoder's layers, those that are there."""
    linears: int = 0
    norms: int = 0
    ordinary: dict[str, list[str]] = field(default_factory=dict)
    """Reason: names of what stays as it was."""
    kernels: set[str] = field(default_factory=set)
    """Of the attentions inside blocks, on a GPU, in words."""
    owners: dict[nn.Module, nn.Module] = field(default_factory=dict)
    """Of each adapted layer inside a block, the module that is called for it."""

    @property
    def notes(self) -> dict[str, str]:
        """For the Run."""
        attentions = sum(isinstance(block, AttentionBlock) for blocks in self.layers.values() for block in blocks)
        mlps = sum(isinstance(block, MlpBlock) for blocks in self.layers.values() for block in blocks)
        counts = {
            "attentions": attentions,
            "MLPs": mlps,
            "other linear layers": self.linears,
            "other norms": self.norms,
        }
        said = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        notes = {"fused": f"{said}, each one node" if said else "nothing"}
        if self.kernels:
            notes["attention_kernels"] = "; ".join(sorted(self.kernels))
        if self.ordinary:
            notes["ordinary"] = "; ".join(
                f"{reason}: {len(names)} modules, first {names[0]}" for reason, names in self.ordinary.items()
            )
        return notes

    def leave(self, reason: str, name: str) -> None:
        names = self.ordinary.setdefault(reason, [])
        # A layer inside says it better than the attention, the MLP or the decoder layer that it is inside of.
        names[:] = [other for other in names if not f"{name}.".startswith(f"{other}.")]
        names.append(name)


def fuse(model: nn.Module, *, layout: Layout, dtype: torch.dtype) -> Fused:
    """Puts a base with its adapter on the fast path; `dtype` is that of the work.  `model` may be PEFT's or the base itself.

    With weights that train (full tuning) there is nothing to skip, and everything stays as it is.
    """
    base: Any = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model  # type: ignore[operator]
    fused = Fused()
    work = _Work(fused, base, layout, dtype)
    modes = {module: module.training for module in base.modules()}
    # Dropout would make any two results different.
    base.eval()
    try:
        work.take()
    finally:
        for module, training in modes.items():
            module.training = training
    return fused


def unfuse(model: nn.Module) -> None:
    """Every module as transformers and PEFT made it."""
    ours = {_layer_forward, _attention_forward, _mlp_forward, _linear_forward, _norm_forward}
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(forward, partial) and forward.func in ours:
            del module.forward


@dataclass(slots=True)
class _Call:
    """How a module was called while the base was tried."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Tensor


class _Work:
    def __init__(self, fused: Fused, base: Any, layout: Layout, dtype: torch.dtype) -> None:
        self.fused, self.base, self.layout, self.dtype = fused, base, layout, dtype
        self.config = base.config.get_text_config()
        self.layers = set(find_layers(base))
        self.covered: set[nn.Module] = set()
        self.device = next(base.parameters()).device
        self.told: dict[nn.Module, dict[str, Any]] = {}
        factors = [p for name, p in base.named_parameters() if "lora_" in name and p.requires_grad]
        self.adapts = bool(factors)
        # PEFT computes an adapter in its own precision, which may be coarser than that of the work.
        self.eps = max([LEAST_EPS, *(torch.finfo(kind).eps for kind in {dtype, *(p.dtype for p in factors)})])

    @property
    def uses_blocks(self) -> bool:
        return self.adapts and not self.layout.mask_padding

    def take(self) -> None:
        """Layers, then parts of those that are left, then linear layers and norms."""
        seen = self.observe() if self.uses_blocks else {}
        if seen:
            for name, layer in self.base.named_modules():
                if layer in self.layers:
                    self.take_layer(name, layer, seen)
            for name, module in self.base.named_modules():
                if module in seen and module not in self.covered:
                    self.take_part(name, module, seen)
        for name, module in self.base.named_modules():
            if module not in self.covered:
                self.take_linear(name, module)
        for _name, module in self.base.named_modules():
            if module not in self.covered:
                self.take_norm(module)

    # ------------------------------------------------------------------------------------------------ running the base

    @torch.no_grad()
    def observe(self) -> dict[nn.Module, _Call]:
        """The calls of everything that has a form, and what each attention tells its kernel.  Empty where the base does not run so."""
        wanted = {m for m in self.base.modules() if m in self.layers or mlp_form(m) or attention_form(m, self.config)}
        calls: dict[nn.Module, _Call] = {}

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            # An attention returns its weights too; a layer that returns more than its rows is of another form.
            found = out[0] if isinstance(out, tuple) and module not in self.layers else out
            if isinstance(found, Tensor):
                calls[module] = _Call(args, kwargs, found)

        probe = self._probe()
        hooks: list[Any] = []
        try:
            with self._autocast():
                with watch_attention(self.base) as self.told:
                    self.base.get_decoder()(**probe)
                # Once more: a base may treat an attention that it does not know otherwise, in its masks for example.
                hooks += [module.register_forward_hook(note, with_kwargs=True) for module in wanted]
                self.base.get_decoder()(**probe)
        except (NotImplementedError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self.fused.leave(f"the base does not run by itself ({type(error).__name__})", type(self.base).__name__)
            return {}
        finally:
            for hook in hooks:
                hook.remove()
        return calls

    def _probe(self) -> dict[str, Any]:
        vocabulary = int(self.base.get_input_embeddings().weight.shape[0])
        draw = torch.Generator().manual_seed(0)
        if not self.layout.packed:
            return {
                "input_ids": torch.randint(vocabulary, (2, PROBE_LENGTHS[0]), generator=draw).to(self.device),
                "use_cache": False,
            }
        ids = torch.randint(vocabulary, (1, sum(PROBE_LENGTHS)), generator=draw)
        places = torch.cat([torch.arange(length) for length in PROBE_LENGTHS])[None]
        borders = torch.tensor([0, *torch.tensor(PROBE_LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
        return {
            "input_ids": ids.to(self.device), "position_ids": places.to(self.device), "use_cache": False,
            **packed_arguments(self.base, borders.to(self.device), max(PROBE_LENGTHS)),
        }  # fmt: skip

    def _autocast(self) -> Any:
        half = self.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self.device.type, dtype=self.dtype) if half else nullcontext()

    def differs(self, call: _Call, run: Callable[[], Tensor], *, added: bool) -> str | None:
        """None where `run` gives what the call gave; `added`: on top of its input."""
        x = call.args[0] if call.args else call.kwargs["hidden_states"]
        with torch.no_grad(), self._autocast():
            found = run()
        if found.shape != call.out.shape or found.dtype != call.out.dtype:
            return "its result has another shape or precision"
        expected = call.out.double()
        part = expected - x.double() if added else expected
        allowed = SLACK * self.eps * (part.norm(dim=-1) + expected.norm(dim=-1))
        error = (found.double() - expected).norm(dim=-1)
        if bool((error <= allowed).all()):
            return None
        return f"it computes something else (a token differs by {float((error / expected.norm(dim=-1)).max()):.1e})"

    # ---------------------------------------------------------------------------------------------------- what is taken

    def _transposed(self) -> bool:
        """Whether FP8 weights may be kept a second time, transposed, for the backward product: where three quarters stay free."""
        if self.device.type != "cuda":
            return False
        free, total = torch.cuda.mem_get_info(self.device)
        return free > 3 * total / 4

    def _attention(self, name: str, module: Any, *, norm: Norm | None, residual: bool) -> FusedAttention | None:
        form = attention_form(module, self.config)
        if form is None:
            return None
        told = self.told.get(module)
        reason = _why_not_attention(module, form, told, device=self.device, dtype=self.dtype)
        if reason is None and told is not None:
            found = FusedAttention.of(
                form, norm=norm, residual=residual, scale=told["scaling"], window=told["sliding_window"], dtype=self.dtype,
                keep_transposed=self._transposed(),
            )  # fmt: skip
            if isinstance(found, FusedAttention):
                if self.device.type == "cuda":
                    self.fused.kernels.add(
                        describe_kernel(
                            form.width, form.queries, form.groups, window=told["sliding_window"], device=self.device,
                            dtype=self.dtype,
                        )
                    )  # fmt: skip
                return found
            reason = found
        self.fused.leave(str(reason), name)
        return None

    def _mlp(self, name: str, module: nn.Module, *, norm: Norm | None, residual: bool) -> FusedMlp | None:
        form = mlp_form(module)
        if form is None:
            return None
        found = FusedMlp.of(form, norm=norm, residual=residual, dtype=self.dtype, keep_transposed=self._transposed())
        if isinstance(found, str):
            self.fused.leave(found, name)
            return None
        return found

    def take_layer(self, name: str, layer: Any, seen: dict[nn.Module, _Call]) -> None:
        form, call = layer_form(layer), seen.get(layer)
        if form is None or call is None or "forward" in vars(layer):
            return
        attention = self._attention(
            f"{name}.self_attn", form.attention, norm=form.before_attention, residual=form.after_attention is None
        )
        mlp = self._mlp(f"{name}.mlp", form.mlp, norm=form.before_mlp, residual=form.after_mlp is None)
        if attention is None:
            return
        parts = _Layer(form, attention, mlp, self.dtype)
        x = call.args[0] if call.args else call.kwargs["hidden_states"]
        told = {key: value for key, value in call.kwargs.items() if key != "hidden_states"}
        if len(call.args) > 1 or not _usual(x, told, self.dtype):
            self.fused.leave(UNUSUAL, name)
            return
        reason = self.differs(call, lambda: parts(layer, x, **told), added=True)
        if reason is not None:
            self.fused.leave(reason, name)
            return
        layer.forward = partial(_layer_forward, layer, parts)
        blocks: list[MlpBlock | AttentionBlock] = [attention.block]
        taken = [form.attention]
        if mlp is not None:
            blocks.append(mlp.block)
            taken.append(form.mlp)
        self.fused.layers[layer] = blocks
        self.fused.owners |= {inside: layer for part in taken for inside in part.modules()}
        self.covered |= {layer, *(inside for part in taken for inside in part.modules())}
        self.covered |= {child for child in layer.children() if child not in (form.attention, form.mlp)}
        self.covered -= {m for m in (form.after_attention, form.after_mlp) if m is not None}
        if mlp is None:
            self.covered -= {form.mlp_norm}

    def take_part(self, name: str, module: Any, seen: dict[nn.Module, _Call]) -> None:
        """An attention or an MLP whose layer has another form."""
        call = seen[module]
        if module in self.layers or "forward" in vars(module):
            return
        found: FusedAttention | FusedMlp | None = self._mlp(name, module, norm=None, residual=False)
        replacement: Any = _mlp_forward
        if found is None:
            found, replacement = self._attention(name, module, norm=None, residual=False), _attention_forward
        if found is None:
            return
        if isinstance(found, FusedAttention):
            # Then it would step aside at every call.
            x = call.args[0] if call.args else call.kwargs["hidden_states"]
            if len(call.args) > 1 or not _usual(x, call.kwargs, self.dtype):
                self.fused.leave(UNUSUAL, name)
                return
        forward = partial(replacement, module, found, self.dtype)
        reason = self.differs(call, lambda: _first(forward(*call.args, **call.kwargs)), added=False)
        if reason is not None:
            self.fused.leave(reason, name)
            return
        module.forward = forward
        owner = next((layer for layer in self.layers if module in set(layer.modules())), module)
        self.fused.layers.setdefault(owner, []).append(found.block)
        self.fused.owners |= dict.fromkeys(module.modules(), module)
        self.covered |= set(module.modules())

    def take_linear(self, name: str, module: Any) -> None:
        """An adapted linear layer that no block covers."""
        from peft.tuners.lora import LoraLayer

        is_adapted = isinstance(module, LoraLayer)  # Kept apart, or mypy would take the module for no more than that.
        if not is_adapted or "forward" in vars(module):
            return
        reason = why_not(module, self.dtype)
        if reason is None:
            found = adapted_group([module], dtype=self.dtype, keep_transposed=self._transposed())
            if isinstance(found, Adapted):
                module.forward = partial(_linear_forward, module, found, self.dtype)
            else:
                reason = found
        if reason is not None:
            self.fused.leave(reason, name)
            return
        self.fused.linears += 1
        self.covered |= set(module.modules())

    def take_norm(self, module: Any) -> None:
        if not type(module).__name__.endswith("RMSNorm") or "forward" in vars(module):
            return
        norm = norm_of(module)
        if norm is None or norm.weight.dtype != self.dtype:
            return
        module.forward = partial(_norm_forward, module, norm)
        self.fused.norms += 1


def _why_not_attention(
    module: Any, form: AttentionForm, told: dict[str, Any] | None, *, device: torch.device, dtype: torch.dtype
) -> str | None:
    if not has_kernel(form.width, device=device, dtype=dtype):
        return f"no attention kernel for heads of {form.width} in {str(dtype).removeprefix('torch.')} on this device"
    if told is None:
        return "its attention calls no kernel that could be watched"
    if told["extras"]:
        return f"its attention has {', '.join(told['extras'])}"
    if vars(module).get("attention_dropout"):
        return "dropout in its attention"
    return None


# ------------------------------------------------------------------------------------------------------ replaced forwards


@dataclass(frozen=True, slots=True)
class _Layer:
    form: LayerForm
    attention: FusedAttention
    mlp: FusedMlp | None
    dtype: torch.dtype

    def __call__(self, layer: nn.Module, hidden_states: Tensor, *args: Any, **told: Any) -> Tensor:
        form = self.form
        x = self.attention(
            hidden_states, told["position_embeddings"], examples_of(hidden_states, told), training=layer.training
        )
        if form.after_attention is not None:
            x = hidden_states + form.after_attention(x)
        y: Tensor
        if self.mlp is None:
            y = form.mlp(form.mlp_norm(x))
        else:
            y = self.mlp(x, training=layer.training)
            if form.after_mlp is None:
                return y
        return x + (y if form.after_mlp is None else form.after_mlp(y))

    def serves(self) -> bool:
        return self.attention.serves() and (self.mlp is None or self.mlp.serves())


def _usual(hidden_states: Any, told: dict[str, Any], dtype: torch.dtype) -> bool:
    """Whether an attention is asked for what a block does."""
    positions = told.get("position_embeddings")
    return (
        isinstance(hidden_states, Tensor) and _works_in(hidden_states, dtype) and hidden_states.dim() == 3
        and told.get("attention_mask") is None and told.get("past_key_values") is None
        and isinstance(positions, tuple) and len(positions) == 2
    )  # fmt: skip


def _works_in(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether rows are in `dtype`, and autocast does not ask for another."""
    kind = x.device.type
    other = dtype != torch.float64 and torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != dtype
    return x.dtype == dtype and not other


def _layer_forward(layer: Any, parts: _Layer, hidden_states: Tensor, *args: Any, **told: Any) -> Any:
    if args or not _usual(hidden_states, told, parts.dtype) or not parts.serves():
        return type(layer).forward(layer, hidden_states, *args, **told)
    return parts(layer, hidden_states, **told)


def _attention_forward(module: Any, fused: FusedAttention, dtype: torch.dtype, *args: Any, **told: Any) -> Any:
    given = dict(told)
    if len(args) == 1:
        given["hidden_states"] = args[0]
    x = given.get("hidden_states")
    if len(args) > 1 or not _usual(x, told, dtype) or not fused.serves():
        return type(module).forward(module, *args, **told)
    assert isinstance(x, Tensor)
    return fused(x, told["position_embeddings"], examples_of(x, told), training=module.training), None


def _mlp_forward(module: Any, fused: FusedMlp, dtype: torch.dtype, x: Tensor, *args: Any, **told: Any) -> Any:
    if args or told or not _works_in(x, dtype) or not fused.serves():
        return type(module).forward(module, x, *args, **told)
    return fused(x, training=module.training)


def _linear_forward(module: Any, adapted: Adapted, dtype: torch.dtype, x: Tensor, *args: Any, **told: Any) -> Any:
    dropout_is_off = adapted.group.dropout and not module.training
    if args or told or not _works_in(x, dtype) or not adapted.is_plain() or dropout_is_off:
        return type(module).forward(module, x, *args, **told)
    return linear_block(x, adapted.group, adapted.parameters())


def _norm_forward(module: Any, norm: Norm, hidden_states: Tensor, *args: Any, **told: Any) -> Any:
    if args or told or hidden_states.dtype != norm.weight.dtype:
        return type(module).forward(module, hidden_states, *args, **told)
    return norm_block(hidden_states, norm)


def _first(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found

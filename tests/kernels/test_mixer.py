"""A mixer on the operators against the same mixer with rounded points, in one pass and token by token; the operators."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_scans import in_float32, kl, quamba
from torch import Tensor

from lowbit import export
from lowbit.arch import Tap
from lowbit.formats import FORMATS
from lowbit.kernels import mixer as kernels
from lowbit.kernels.mixer import Cache, convolved, prefilled, scan_of, stepped
from lowbit.kernels.reference import Scan
from lowbit.qtensor import TENSOR, Spec
from lowbit.ssm import CHUNK, Mixer, is_mixer
from lowbit.unit import Static

S8 = Spec(format=FORMATS["int8"], group=TENSOR, dynamic=False)


def labels_of(mixer: Mixer, name: str) -> Tensor:
    """One scale a state group for B and C, one for each quarter of the channels for x and the state, else one."""
    sets = mixer.features(name)[0]
    if name in ("x", "state"):
        return torch.arange(sets) * 4 // sets
    group = mixer.group_of(name)
    return torch.zeros(sets, dtype=torch.int64) if group is None else group


def calibrated(mixer: Mixer, hidden: Tensor) -> dict[str, Static]:
    """Scales of every point from what it is for `hidden`."""
    seen: dict[str, Tensor] = {}

    def observe(name: Any, x: Tensor, transposed: bool) -> Tensor:
        if isinstance(name, str):
            short = name.rpartition(".")[2]
            sets, inner = mixer.features(short)
            most = x.detach().abs().reshape(-1, sets, inner).amax(0)
            seen[short] = torch.maximum(seen.get(short, most), most)
        return x

    with Tap(observe):
        mixer(hidden)
    found = {}
    for name, most in seen.items():
        labels = labels_of(mixer, name)
        largest = torch.zeros(int(labels.max()) + 1, most.shape[1])
        largest.scatter_reduce_(0, labels[:, None].expand_as(most), most, "amax")
        found[name] = Static(spec=S8, largest=largest, labels=labels)
    return found


def into_out_proj(mixer: Mixer, hidden: Tensor, points: dict[str, Static]) -> Tensor:
    """What a mixer with rounded points gives to its last linear."""
    found = []

    def observe(name: Any, x: Tensor, transposed: bool) -> Tensor:
        if isinstance(name, str):
            short = name.rpartition(".")[2]
            return points[short].quantize(x) if short in points else x
        if name is mixer.module.out_proj.weight:
            found.append(x)
        return x

    with Tap(observe):
        mixer(hidden)
    return found[0]


def on_operators(mixer: Mixer, hidden: Tensor, points: dict[str, Static], first: int) -> Tensor:
    """The same: `first` tokens at once, the others one by one."""
    m = mixer.module
    limits = m.time_step_limit
    scan = scan_of(
        A=-m.A_log.exp(), D=m.D, dt_bias=m.dt_bias, groups=mixer.groups, limits=(float(limits[0]), float(limits[1])),
        **{name: points[name] for name in ("x", "B", "C", "state", "z", "dt")},
    )  # fmt: skip
    weight, bias = m.conv1d.weight.squeeze(1), m.conv1d.bias
    in_scale = float(points["conv_in"].largest) / 127
    z, conv_in, dt = m.in_proj(hidden).split([mixer.channels, len(weight), mixer.heads], -1)
    cache = Cache.empty(scan, len(hidden), weight.shape[1], "cpu")
    codes = convolved(conv_in[:, :first], cache, weight, bias, in_scale, scan)
    found = [prefilled(codes, dt[:, :first], z[:, :first], cache, scan, torch.float32)]
    held = torch.full((len(hidden),), first % CHUNK, dtype=torch.int32)
    for t in range(first, hidden.shape[1]):
        y = stepped(conv_in[:, t], dt[:, t], z[:, t], cache, weight, bias, in_scale, held, scan, torch.float32)
        found.append(y.unsqueeze(1))
        held = (held + 1) % CHUNK
    gated = torch.cat(found, 1).unflatten(-1, (mixer.norm_groups(), -1))
    return (gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + m.norm.variance_epsilon)).flatten(-2) * m.norm.weight


def tiny_mixer() -> tuple[Mixer, Tensor]:
    """One with two state groups; hidden states that fill a run and start another."""
    module = next(module for module in tiny.build("bamba").modules() if is_mixer(module))
    return Mixer(module, "mixer"), torch.randn(2, CHUNK + 5, module.in_proj.in_features)


@pytest.mark.parametrize("interpreted", [False, True])
@torch.no_grad()
def test_mixer_on_the_operators(interpreted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a run is reached by steps, and the state rounded there is used."""
    if interpreted:
        pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreted else "0")
    mixer, hidden = tiny_mixer()
    points = calibrated(mixer, hidden)
    wanted = into_out_proj(mixer, hidden, points)

    def error(found: Tensor) -> float:
        return float((found - wanted).norm() / wanted.norm())

    assert error(on_operators(mixer, hidden, points, CHUNK - 3)) < 2e-3
    assert error(into_out_proj(mixer, hidden, {})) > 4e-3  # of float points


@torch.no_grad()
def test_a_loaded_model_on_interpreted_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some tokens at once, then one by one."""
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    out, tokens = quamba("mamba2", tmp_path, "w8a8"), tiny.tokens(1, 12)
    wanted, model = export.load(out)(tokens).logits, in_float32(out)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    first = model(tokens[:, :9], use_cache=True)
    steps = [model(token, cache_params=first.cache_params, use_cache=True).logits for token in tokens[:, 9:].split(1, 1)]
    assert kl(wanted, torch.cat([first.logits, *steps], 1)) < 1e-3


@pytest.mark.parametrize("interpreted", [False, True])
@pytest.mark.parametrize("kernel", [2, 3, 4, 5])
def test_tokens_in_parts(kernel: int, interpreted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefills shorter and longer than the convolution and steps between them are all tokens at once, and what they keep is."""
    if interpreted:
        pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreted else "0")
    of, *_ = some_scan()
    parts_of_it = (1, 1, 2, 1, 20, 1, 37, 1, 1, 3)  # the end of a run is that of a step
    x, dt = torch.randn(2, sum(parts_of_it), 24), torch.randn(2, sum(parts_of_it), 2)
    how = (torch.randn(24, kernel), torch.randn(24), 0.03)
    whole, cache = (Cache.empty(of, 2, kernel, "cpu") for _ in range(2))
    wanted = prefilled(convolved(x, whole, *how, of), dt, None, whole, of, torch.float32)
    found, held = [], 0
    for new, dt_new in zip(x.split(parts_of_it, 1), dt.split(parts_of_it, 1), strict=True):
        if new.shape[1] == 1 and found:
            counts = torch.full((2,), held, dtype=torch.int32)
            found.append(stepped(new[:, 0], dt_new[:, 0], None, cache, *how, counts, of, torch.float32).unsqueeze(1))
        else:
            codes = convolved(new, cache, *how, of, held=held)
            found.append(prefilled(codes, dt_new, None, cache, of, torch.float32, held=held))
        held = (held + new.shape[1]) % CHUNK
    assert float((torch.cat(found, 1) - wanted).norm() / wanted.norm()) < 2e-3
    last = (held - torch.arange(1, kernel)) % whole.past.shape[2]
    assert torch.equal(cache.past[..., last], whole.past[..., last]) and whole.past[..., last].any()
    assert (cache.state.int() - whole.state.int()).abs().max() <= 1 and cache.state.any()
    assert (cache.tokens[:, :held].int() - whole.tokens[:, :held].int()).abs().max() <= 1
    assert torch.equal(cache.steps[..., :held], whole.steps[..., :held])


def some_scan() -> tuple[Scan, Cache, Tensor, Tensor]:
    """A scan, its cache, codes of three tokens and their dt."""
    of = Scan(
        A=-torch.rand(2), D=torch.rand(2), dt_bias=torch.rand(2), scales=torch.rand(24), state_scale=torch.rand(1, 4),
        labels=torch.zeros(16, dtype=torch.int32), groups=1,
    )  # fmt: skip
    return of, Cache.empty(of, 2, 4, "cpu"), torch.randint(-9, 9, (2, 3, 24), dtype=torch.int8), torch.randn(2, 3, 2)


def test_operators_are_registered_as_torch_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Schemas with what changes in place, and fake kernels."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    of, cache, codes, dt = some_scan()
    held, parts, checks = torch.tensor([2, 3], dtype=torch.int32), kernels.parts(of), ("test_schema", "test_faketensor")
    x, how = torch.randn(2, 3, 24), (torch.randn(24, 4), None, 0.1)
    torch.library.opcheck(kernels.conv, (x, cache.past, *how, of.scales, 2), test_utils=checks)
    torch.library.opcheck(kernels.scan, (codes, dt, None, cache.state, *parts, torch.float16), test_utils=checks)
    step = (x[:, 0], dt[:, 0], None, *cache, *how, held, *parts, torch.float16)
    torch.library.opcheck(kernels.step, step, test_utils=checks)
    run = torch.compile(stepped, backend="aot_eager", fullgraph=True)
    both = [Cache(*(part.clone() for part in cache)) for _ in range(2)]
    given = (x[:, 0], dt[:, 0], None)
    found = [f(*given, own, *how, held, of, torch.float32) for f, own in zip((run, stepped), both, strict=True)]
    assert torch.equal(*found) and all(torch.equal(*pair) for pair in zip(*both, strict=True))
    assert not torch.equal(both[0].tokens, cache.tokens)


def test_scales_that_kernels_do_not_have_are_refused() -> None:
    """Before anything runs, with the point's name."""
    one = {"A": -torch.ones(2), "D": torch.ones(2), "dt_bias": torch.ones(2), "groups": 1}
    same = Static(spec=S8, largest=torch.ones(1, 1), labels=torch.zeros(4, dtype=torch.int64))
    points = dict.fromkeys(("x", "B", "C", "state"), same)
    assert scan_of(**one, **points).sizes == (4, 4, 4)
    uneven = Static(spec=S8, largest=torch.tensor([[1.0], [2.0]]), labels=torch.tensor([0, 1, 0, 1]))
    assert scan_of(**one, **points | {"x": uneven}).scales[:4].tolist() == pytest.approx([1 / 127, 2 / 127] * 2)
    with pytest.raises(ValueError, match="B has several scales"):
        scan_of(**one, **points | {"B": uneven})
    with pytest.raises(ValueError, match="state is int4; .* int8: quantize it with s8"):
        scan_of(**one, **points | {"state": replace(same, spec=replace(S8, format=FORMATS["int4"]))})

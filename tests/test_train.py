"""Model, optimizers and warm-up of train.py: against dense masks, SVDs and hand calculations; the gpu sizes on `meta`."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import ModuleType
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, bubblewrap_works, data_of, replaced, rows_of, small
from test_prepare import make_run
from torch.nn.attention import SDPBackend, sdpa_kernel

import constants
import prepare
import train
from lab.machine import CARD_CLASSES

CPU = constants.PROFILES["cpu"]
GPU = replace(constants.PROFILES["gpu"], dtype="bfloat16")
SMALL = replace(
    train.CONFIGS["cpu"], n_layer=2, n_embd=64, head_dim=32, step_tokens=1024, micro_rows=2, value_embeds=True, ngram_rows=2**12
)  # fmt: skip


def small_model(config=SMALL, dtype=torch.float32):
    torch.manual_seed(0)
    return train.GPT(config, CPU.vocab_size, CPU.max_seq_len, dtype)


def shaken(model):
    """The model with every parameter away from its initial zeros, so that each part matters."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


SIZES = {  # class of card: memory in GB of one, layers, width, tokens a step, rows of the first forward pass, parameters
    "H100": (85.0, 9, 640, 2**18, 128, 80.94e6),
    "A100": (42.4, 8, 512, 2**17, 64, 50.33e6),
    "RTX 4090": (25.3, 5, 512, 2**16, 32, 36.70e6),
    "small": (8.4, 4, 384, 2**15, 16, 19.66e6),
}


def profile_of(sizes: str):
    return replace(GPU, sizes=sizes, memory_gb=SIZES[sizes][0])


@pytest.mark.parametrize("sizes", [*SIZES, "cpu"])
def test_sizes_fit_profile_and_card(sizes):
    profile = CPU if sizes == "cpu" else profile_of(sizes)
    config = train.config_of(profile)
    assert config.n_embd % config.head_dim == 0 and config.head_dim % 2 == 0
    micro_rows = train.first_micro_rows(config, profile)
    assert config.step_tokens % (profile.max_seq_len * micro_rows) == 0
    if sizes != "cpu":
        assert (config.n_layer, config.n_embd, config.step_tokens, micro_rows) == SIZES[sizes][1:5]
        assert train.first_micro_rows(config, replace(profile, micro_rows=4)) == 4  # what an earlier run found
        with torch.device("meta"):
            params = sum(p.numel() for p in train.build_model(profile).parameters())
        assert params == pytest.approx(SIZES[sizes][5], rel=1e-4)


@pytest.mark.parametrize(
    ("sizes", "memory_gb", "dtype", "rows"),
    [("RTX 4090", 8.6, "bfloat16", 16), ("small", 8.4, "float32", 8), ("H100", 141.0, "bfloat16", 128), ("H100", 2.0, "bfloat16", 1)],
)  # fmt: skip
def test_the_rows_that_are_tried_first_fit_the_card(sizes, memory_gb, dtype, rows):
    """A row takes 0.037 + 8.05e-5 x layers x width GB, compiled; 2.4 times that in float32."""
    profile = replace(GPU, sizes=sizes, memory_gb=memory_gb, dtype=dtype)
    assert train.first_micro_rows(train.config_of(profile), profile) == rows


def test_a_float32_run_has_no_bf16_parameter():
    """Turing and Volta: the compiler takes no graph with one there."""
    with torch.device("meta"):
        model = train.build_model(replace(profile_of("small"), dtype="float32"))
        half = train.build_model(profile_of("small"))
    assert {tensor.dtype for tensor in (*model.parameters(), *model.buffers())} == {torch.float32}
    assert half.embed.weight.dtype == torch.bfloat16


def test_every_class_of_card_has_its_sizes():
    assert [*train.CONFIGS] == [*SIZES, "cpu"] == [*(name for name, _, _ in CARD_CLASSES), "cpu"]


@pytest.mark.parametrize("sizes", [dict(n_embd=96), dict(step_tokens=1000)])
def test_sizes_that_do_not_fit_together_are_named(sizes, monkeypatch):
    monkeypatch.setitem(train.CONFIGS, "cpu", replace(train.CONFIGS["cpu"], **sizes))
    with pytest.raises(ValueError, match=f"{next(iter(sizes))} .* is not a multiple of"):
        train.build_model(CPU)


# --- model


def test_an_untrained_model_predicts_uniformly():
    x = torch.randint(CPU.vocab_size, (2, 64))
    assert small_model().loss(x, x).item() == pytest.approx(math.log(CPU.vocab_size), abs=0.05)


@pytest.mark.parametrize("window", [0, 32])
def test_logits_depend_on_the_past_of_their_row_alone(window):
    model = shaken(small_model(replace(SMALL, short_window=window)))
    x = torch.randint(CPU.vocab_size, (3, 128))
    y = x.clone()
    y[0, 70:] = torch.randint(CPU.vocab_size, (58,))
    y[2] = torch.randint(CPU.vocab_size, (128,))
    a, b = model(x), model(y)
    assert torch.allclose(a[0, :70], b[0, :70], atol=1e-5) and torch.allclose(a[1], b[1], atol=1e-5)
    assert not torch.allclose(a[0, 70:], b[0, 70:], atol=1e-3)


@pytest.mark.parametrize("T", [32, 47])
@pytest.mark.parametrize("window", [1, 4, 16])
def test_windowed_attention_equals_a_dense_mask(window, T):
    q, k, v = (torch.randn(2, 3, T, 8, dtype=torch.float64) for _ in range(3))
    i, j = torch.arange(T)[:, None], torch.arange(T)[None]
    mask = (j <= i) & (j > i - window)  # `window` tokens with itself
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert torch.allclose(train.windowed_attention(q, k, v, window), expected, atol=1e-5)
    off_by_one = F.scaled_dot_product_attention(q, k, v, attn_mask=(j <= i) & (j >= i - window))
    assert not torch.allclose(train.windowed_attention(q, k, v, window), off_by_one, atol=1e-3)


def test_a_fused_kernel_takes_the_windowed_fallback():
    """torch's own flash kernel for CPUs, with no other one allowed: it refuses what is not 4-D, as those for CUDA do."""
    q, k, v = (torch.randn(2, 3, 64, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        train.windowed_attention(q, k, v, 16).sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


def test_dense_attention_stays_within_documents():
    q, k, v = (torch.randn(2, 3, 16, 8) for _ in range(3))
    documents = torch.tensor([[0] * 5 + [1] * 11, [3] * 16])
    found = train.dense_attention(q, k, v, documents)
    for row, begin, end in ((0, 0, 5), (0, 5, 16), (1, 0, 16)):
        alone = (t[row : row + 1, :, begin:end] for t in (q, k, v))
        expected = F.scaled_dot_product_attention(*alone, is_causal=True)
        assert torch.allclose(found[row : row + 1, :, begin:end], expected, atol=1e-5)


def test_a_document_begins_with_its_first_token():
    config = replace(SMALL, conv_taps=0, smear=False, ngrams=())  # nothing else looks back
    model = shaken(small_model(config))
    bos_id = CPU.vocab_size - len(prepare.SPECIAL_TOKENS)
    x = torch.randint(bos_id, (1, 16))
    x[0, 5] = bos_id
    y = x.clone()
    y[0, 4] = (x[0, 4] + 1) % bos_id
    a, b = model(x), model(y)
    assert torch.equal(a[0, 5:], b[0, 5:]) and not torch.allclose(a[0, 4], b[0, 4], atol=1e-3)


def flash(q, k, v, window, extra=0):
    """Torch's own bf16 flash kernel for CPUs as a backend of (B, T, H, D); `extra` keys too many on the left."""
    T = q.size(1)
    i, j = torch.arange(T)[:, None], torch.arange(T)[None]
    mask = (j <= i) & (j > i - (window or T) - extra)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask).transpose(1, 2)


def test_the_proof_lets_a_correct_flash_kernel_pass_and_finds_a_window_off_by_one():
    cpu, bf16 = torch.device("cpu"), torch.bfloat16
    right = [train.attention_error(flash, window, cpu, bf16) for window in (256, 0)]
    wrong = [train.attention_error(partial(flash, extra=extra), 256, cpu, bf16) for extra in (1, -1)]
    assert max(right) < 0.006 < 0.01 < 0.02 < min(wrong)
    silent = train.attention_error(lambda q, k, v, window: flash(q, k, v, window) * math.nan, 0, cpu, bf16)
    assert silent == math.inf


def test_a_backend_that_fails_says_why(monkeypatch):
    cpu = torch.device("cpu")
    assert train.attention_trouble("sdpa", cpu, torch.float32) == ""
    assert train.attention_trouble("sdpa", cpu, torch.bfloat16) == ""
    assert "flash_attn" in train.attention_trouble("FA3", cpu, torch.bfloat16)
    assert "flash_attn" in train.attention_trouble("FA4", cpu, torch.bfloat16)
    attend = train.attend
    monkeypatch.setattr(train, "attend", lambda q, k, v, window, backend: attend(q, k, v, 2 * window, backend))
    assert "differs from a dense mask" in train.attention_trouble("sdpa", cpu, torch.bfloat16)
    for error in (KeyError("sm_90"), AssertionError(), OSError("libcudart.so.12: cannot open"), MemoryError()):
        monkeypatch.setattr(train, "attend", Mock(side_effect=error))
        assert train.attention_trouble("sdpa", cpu, torch.bfloat16)  # any exception: the next one may work


def test_the_first_backend_that_works_is_taken_and_a_night_stays_with_it(monkeypatch, capsys):
    cuda, choose = torch.device("cuda"), train.choose_attention.__wrapped__
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    works, activated = {"FA4", "sdpa"}, []
    monkeypatch.setattr(train, "attention_trouble", lambda backend, *_: "" if backend in works else "not installed")
    monkeypatch.setattr(prepare, "activate_attention", activated.append)
    assert choose(cuda, torch.bfloat16, None) == "FA4"
    assert capsys.readouterr().out == "attention: FA3 does not work here: not installed\nattention: FA4\n"
    assert choose(cuda, torch.bfloat16, "FA2") == "FA2" and activated == ["FA2"]  # the baseline's, not proved again
    works.clear()
    with pytest.raises(SystemExit, match="no attention backend works"):
        choose(cuda, torch.bfloat16, None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose(cuda, torch.bfloat16, None) == "sdpa"


@pytest.mark.parametrize("returned", [2, 4, 5])  # up to 4.0.0b18, from b19 on, from b33 on
def test_torch_gets_the_two_values_of_flash_attention_4_that_it_unpacks(returned, monkeypatch):
    """Torch's own calls, on a module with the signatures of the wheel 4.0.0b36."""
    from torch.nn.attention import _fa4

    kernels = ModuleType("flash_attn.cute.interface")

    def _flash_attn_fwd(
        q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None, window_size_left=None,
        window_size_right=None, learnable_sink=None, num_splits=1, return_lse=False, out=None, lse=None,
    ):  # fmt: skip
        assert kernels._flash_attn_fwd.compile_cache == {}  # it finds itself by its name in the module
        return (out, q.new_zeros(1, 4), None, None, None)[:returned]

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, deterministic=False, dlse=None,
    ):  # fmt: skip
        return q, k, v

    _flash_attn_fwd.compile_cache = {}
    kernels._flash_attn_fwd, kernels._flash_attn_bwd = _flash_attn_fwd, _flash_attn_bwd
    for name in ("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"):
        monkeypatch.setenv(name, "set")  # so that what register_fa4 sets goes with the test
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, kernels.__name__, kernels)
    _fa4._fa4_import_module.cache_clear()
    try:
        prepare.activate_attention("FA4")
        assert torch.nn.attention.current_flash_attention_impl() == "FA4"
        q = torch.ones(4, 1, 8)
        out, lse = _fa4._fa4_run_forward(q, q, q, None, None, 4, 4, None, True, 255, 0, None, q)
        assert out is q and lse.shape == (1, 4)
        assert len(_fa4._fa4_run_backward(q, q, q, q, q, lse, None, None, None, True, 255, 0)) == 3
    finally:
        prepare.activate_attention("sdpa")
    assert torch.nn.attention.current_flash_attention_impl() is None


def test_rotation_makes_scores_depend_on_distance_alone():
    model = small_model()
    q, k = torch.randn(1, 1, 1, 32), torch.randn(1, 1, 1, 32)
    turn = lambda x, t: train.rotate(x, model.cos[t : t + 1], model.sin[t : t + 1])  # noqa: E731
    scores = [(turn(q, t + 5) * turn(k, t)).sum().item() for t in (0, 17, 100)]
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-4)
    assert (turn(q, 9) * turn(k, 0)).sum().item() != pytest.approx(scores[0], abs=1e-3)


def test_value_embeddings_are_mixed_by_their_gates():
    model = shaken(small_model())
    assert set(model.value_embeds) == {"1"}  # alternating from the last layer
    x = torch.randint(CPU.vocab_size, (1, 16))
    before = model(x)
    gate = model.blocks[1].attention.gate.weight
    with torch.no_grad():
        gate.fill_(0)
        gate[0] = -100.0  # the first head takes none, or twice, by the sign of its channels
    assert not torch.allclose(model(x), before, atol=1e-4)
    with torch.no_grad():
        model.value_embeds["1"].weight.zero_()
        none = model(x)
        gate.normal_()
    assert torch.allclose(model(x), none)  # without value embeddings the gate has nothing to mix


def test_the_most_frequent_ngrams_have_rows_of_their_own():
    text = np.array([[1, 2, 3, 1, 2, 3, 9], [1, 2, 4, 8, 2, 3, 9]], np.uint16)  # the last column is no input
    pairs, triples = (train.NgramTable(n, n + 1, 8, 10, torch.float32) for n in (2, 3))
    with torch.no_grad():
        for table in (pairs, triples):  # a row says its number
            table.table.weight.copy_(torch.arange(table.n + 1.0)[:, None].expand(-1, 8))
    idx = torch.tensor([[1, 2, 3, 9, 2, 3], [3, 1, 2, 3, 1, 2]])
    assert not pairs(idx).any()  # nothing is known yet
    pairs.learn(text)  # 1 2 three times, 2 3 three times; the rest less
    assert pairs(idx)[..., 0].tolist() == [[0, 1, 2, 0, 0, 2], [0, 0, 1, 2, 0, 1]]
    triples.learn(text)  # twice: 1 at the start of a row, 1 2 there, 1 2 3; the rest once
    assert triples.number(idx).tolist() == [[1, 12, 123, 239, 392, 923], [3, 31, 312, 123, 231, 312]]
    assert triples(idx)[..., 0].tolist() == [[1, 2, 3, 0, 0, 0], [0, 0, 0, 3, 0, 0]]
    assert triples(idx[:, :1]).shape == (2, 1, 8)


def test_from_the_second_epoch_on_half_of_the_positions_do_without_their_ngrams():
    model = shaken(small_model())
    idx = torch.randint(CPU.vocab_size, (4, 256))
    pairs = model.ngrams[0]
    pairs.learn(np.concatenate([idx.numpy(), idx.numpy()[:, -1:]], axis=1))
    met = len(pairs.number(idx).unique())

    def share() -> float:
        """Of the pairs met, those whose row gets a gradient."""
        (slope,) = torch.autograd.grad(model.loss(idx, idx), [pairs.table.weight])
        return (slope[1:].abs().sum(1) > 0).sum().item() / met

    assert share() == 1.0
    model.ngram_dropout.fill_(0.5)
    assert 0.4 < share() < 0.6
    model.eval()
    assert torch.equal(model(idx), model(idx))


def test_weights_follow_the_activations_dtype():
    model = small_model(replace(SMALL, table_dtype=torch.bfloat16), torch.bfloat16)
    assert model.embed.weight.dtype == torch.bfloat16 and model.head.weight.dtype == torch.float32
    seen = []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    logits = model(torch.randint(CPU.vocab_size, (1, 16)))
    assert seen == [torch.bfloat16] and logits.dtype == torch.float32


# --- optimizers


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 64), (2, 64, 16)])
def test_orthogonalising_brings_all_singular_values_near_one(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    keep = s > 1e-2 * s[:, :1]  # the iteration promises nothing for directions that are all but absent
    y = train.orthogonalise(x)
    values = torch.einsum("kni,knm,kim->ki", u, y, vh)
    assert ((values - 1).abs()[keep] < 0.15).all()
    off = y - torch.einsum("kni,ki,kim->knm", u, values, vh)
    assert off.abs().max() < 1e-6  # the singular vectors are x's own


def muon_step(weights, scale=1.0, weight_decay=0.0):
    """The weights after one step of Muon at rate 0.1, by a gradient of this size that is always the same."""
    parameter = torch.nn.Parameter(weights)
    optimizer = train.Muon([parameter], lr=0.1, weight_decay=weight_decay, dtype=torch.float32)
    parameter.grad = torch.randn(weights.shape, generator=torch.Generator().manual_seed(3)) * scale
    optimizer.step()
    return parameter.detach()


def test_muon_steps_by_its_rate_whatever_the_gradients_size():
    small, large = (muon_step(torch.zeros(16, 32), scale) for scale in (1.0, 1000.0))
    assert torch.allclose(small, large, atol=1e-5)
    assert small.norm().item() == pytest.approx(0.1 * math.sqrt(16), rel=0.1)  # 16 singular values near 1


def test_muons_decay_acts_only_where_it_agrees_with_the_step():
    decayed, plain = (muon_step(torch.ones(8, 8), weight_decay=decay) for decay in (0.5, 0.0))
    expected = torch.where(plain < 1.0, 0.05, 0.0)
    assert torch.allclose(plain - decayed, expected) and 0 < (plain < 1.0).sum() < 64


def test_every_parameter_is_in_one_group():
    model = small_model()
    optimizers = train.build_optimizers(model, SMALL, torch.float32)
    grouped = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_the_schedule_holds_and_then_falls():
    model = small_model()
    optimizers = train.build_optimizers(model, SMALL, torch.float32)
    group, rates = optimizers[0].param_groups[0], []
    for progress in (0.0, 1 - SMALL.warmdown, 1 - SMALL.warmdown / 2, 1.0):
        train.set_schedule(optimizers, SMALL, progress, 0)
        rates.append(group["lr"] / group["initial_lr"])
    assert rates == pytest.approx([1.0, 1.0, (1 + SMALL.final_lr) / 2, SMALL.final_lr])
    train.set_schedule(optimizers, replace(SMALL, warmdown=0.0), 0.99, 0)  # none
    assert group["lr"] == group["initial_lr"]


# --- warm-up


@pytest.fixture
def small_run(cache, tmp_path):
    run = make_run(data_of(cache), tmp_path)
    run._rows = prepare.open_rows(data_of(cache) / "train.bin", CPU)  # before the clock it has one row, many times
    return run


def one_step(run, warm: bool):
    """(losses of both micro-batches of two steps, random numbers, parameters) after a warm-up or without one."""
    torch.manual_seed(0)
    model = shaken(small_model())
    optimizers = train.build_optimizers(model, SMALL, torch.float32)
    before = [p.detach().clone() for p in model.parameters()]
    if warm:
        train.warm_up(run, model, optimizers, model.loss, SMALL)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
        assert all(not tensor.any() for o in optimizers for state in o.state.values() for tensor in state.values())
        assert all(p.grad is None for p in model.parameters())
    random_numbers = torch.rand(3)
    batches = run.batches(run._rows, SMALL.micro_rows)
    losses = [train.train_step(model.loss, optimizers, batches, 2).tolist() for _ in range(2)]
    return losses, random_numbers.tolist(), [p.detach().clone() for p in model.parameters()]


def test_after_a_warm_up_everything_is_as_before_it(small_run):
    cold, warm = one_step(small_run, False), one_step(small_run, True)
    assert cold[:2] == warm[:2]
    assert all(torch.equal(p, q) for p, q in zip(cold[2], warm[2], strict=True))


def test_accumulated_micro_batches_make_the_step_of_one_batch(small_run):
    gradients = []
    for micro_rows, accumulate in ((4, 1), (2, 2)):
        model = shaken(small_model())
        batches = small_run.batches(small_run._rows, micro_rows)
        train.train_step(model.loss, [], batches, accumulate)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(gradients[0], gradients[1], atol=1e-5)


def test_nothing_is_compiled_after_the_warm_up(small_run, monkeypatch):
    import torch._dynamo.testing  # here, since it takes seconds

    counter, compiler = torch._dynamo.testing.CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiler(f, backend=counter, **how))
    torch._dynamo.reset()
    model = small_model()
    optimizers = train.build_optimizers(model, SMALL, torch.float32, compiled=True)
    loss_fn = torch.compile(model.loss, dynamic=False, fullgraph=True)
    micro_rows, _ = train.warm_up(small_run, model, optimizers, loss_fn, SMALL)
    shapes = {p.shape for group in optimizers[1].param_groups for p in group["params"]}
    assert counter.frame_count == 1 + len(shapes)  # the loss, and Muon's update of each shape
    batches = small_run.batches(small_run._rows, micro_rows)
    for ngrams in model.ngrams:
        ngrams.learn(small_run._rows)
    for step in range(3):
        train.set_schedule(optimizers, SMALL, step / 3, step)
        model.ngram_dropout.fill_(step / 4)
        train.train_step(loss_fn, optimizers, batches, SMALL.step_tokens // CPU.max_seq_len // micro_rows)
    assert counter.frame_count == 1 + len(shapes)


def test_what_says_that_memory_is_short():
    """torch, its compiler, cuBLAS, cuDNN, Triton and Apple each have their own words; other errors are no lack of memory."""
    words = (
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `x`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", "Triton Error [CUDA]: out of memory",
        "OutOfMemoryError: Tried to allocate 2.00 GiB.",
    )  # fmt: skip
    own = torch.OutOfMemoryError("no room"), torch.AcceleratorError("CUDA error: out of memory")
    assert all(map(train.out_of_memory, (*own, *map(RuntimeError, words))))
    others = "out of resource: shared memory, Required: 9", "CUDA error: an illegal memory access was encountered", "no"
    assert not any(map(train.out_of_memory, map(RuntimeError, others)))


def test_the_micro_batch_is_halved_while_memory_is_short(small_run, capsys):
    model, rows = small_model(), []

    def loss_fn(x, y):
        rows.append(len(x))
        if len(x) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return model.loss(x, y)

    optimizers = train.build_optimizers(model, SMALL, torch.float32)
    assert train.warm_up(small_run, model, optimizers, loss_fn, SMALL)[0] == 1
    assert rows[:2] == [2, 1] and "out of memory: 1 rows at a time" in capsys.readouterr().out
    with pytest.raises(ValueError):
        train.warm_up(small_run, model, [], Mock(side_effect=ValueError("no")), SMALL)


# --- the gpu sizes, without a GPU


@pytest.mark.parametrize("compiled", [False, True])
def test_a_full_training_step_at_the_gpu_sizes_runs_on_meta(compiled, monkeypatch):
    """Shapes, dtypes and the 16-bit attention inputs that FlashAttention asks for (asserted in attend)."""
    attend = Mock(side_effect=train.attend)
    if not compiled:
        monkeypatch.setattr(train, "attend", attend)
    torch._dynamo.reset()
    profile = profile_of("H100")
    config = train.config_of(profile)
    with torch.device("meta"):
        model = train.build_model(profile)
        rows = torch.zeros(4, GPU.max_seq_len + 1, dtype=torch.int64)
    optimizers = train.build_optimizers(model, config, torch.bfloat16)
    loss_fn = torch.compile(model.loss, backend="eager", fullgraph=True, dynamic=False) if compiled else model.loss
    train.train_step(loss_fn, optimizers, iter([(rows[:, :-1], rows[:, 1:])]), 1)
    if not compiled:
        assert [call.args[3] for call in attend.call_args_list] == [*[256] * 4, 0, *[256] * 3, 0]


def test_flops_of_a_token_by_hand():
    config = replace(SMALL, n_layer=1, value_embeds=False)
    model = train.GPT(config, 1000, 128, torch.float32)
    matrices = 12 * 64 * 64 + 64 * 1000  # query, key, value, out and the two of the MLP; the head
    assert model.flops_per_token(128) == 6 * matrices + 12 * 64 * 128


# --- runs by hand


def test_a_run_by_hand_learns_and_its_score_agrees(real_checkout, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(real_checkout.cache))
    (real_checkout.folder / "train.py").write_text(small((ROOT / "train.py").read_text()))
    real_checkout.git("-c", "user.name=User", "-c", "user.email=u@example.com", "commit", "-qam", "small")
    process = real_checkout.start(script="train.py", AUTORESEARCH_TIME_BUDGET="3")
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    closing = output[output.rindex("---\n") :].splitlines()
    assert [line.split(":")[0] for line in closing[1:]] == list(prepare.SUMMARY_DIGITS)
    folder = real_checkout.folder / "runs" / "by-hand"
    result = json.loads((folder / "out" / "result.json").read_text())
    assert result["val_bpb"] < 2.9 and 1 < result["training_seconds"] < 5 and result["mfu_percent"] is None
    assert result["losses"][-1][2] < result["losses"][0][2]
    command = [sys.executable, "-m", "lab.measure.score", "runs/by-hand"]
    place = dict(cwd=real_checkout.folder, env=real_checkout.environment, capture_output=True, text=True, timeout=120)
    done = subprocess.run(command, **place)
    assert done.returncode == 0, done.stderr
    with constants.lock(constants.device_lock("cpu"), "a night"), pytest.raises(constants.Problem, match="in use by"):
        prepare.hold_device("cpu", "python -m lab.measure.score")
    said = dict(line.split(":", 1) for line in done.stdout.splitlines() if "_bpb:" in line)
    assert float(said["val_bpb"]) == pytest.approx(result["val_bpb"], rel=1e-4) and 1 < float(said["test_bpb"]) < 4
    assert "as you" in done.stdout and "it writes:\n" in done.stdout
    assert real_checkout.git("status", "--short") == ""


def test_a_loss_that_is_no_number_ends_the_run_at_once(cache, tmp_path, monkeypatch):
    source, line = small((ROOT / "train.py").read_text()), "losses.append(loss.detach()"
    edited = replaced(source, line, f"{line} * math.nan")
    monkeypatch.setattr(prepare, "start", lambda: make_run(data_of(cache), tmp_path, budget_s=20.0))
    with pytest.raises(SystemExit, match="loss nan at step 1"):
        exec(compile(edited, "train.py", "exec"), {"__name__": "__main__"})


def test_what_is_missing_is_one_clear_line(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if not torch.cuda.is_available():
        with pytest.raises(constants.Problem, match="profile gpu: torch"):
            prepare.settings_by_hand("gpu", "sotu")
    monkeypatch.setenv("AUTORESEARCH_TIME_BUDGET", "soon")
    with pytest.raises(constants.Problem, match="takes seconds"):
        prepare.settings_by_hand("cpu", "sotu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_the_gpu_equals_one_on_the_cpu():
    model = shaken(small_model())
    x, y = (torch.randint(CPU.vocab_size, (2, 32)) for _ in range(2))
    expected = model.loss(x, y).item()
    assert model.cuda().loss(x.cuda(), y.cuda()).item() == pytest.approx(expected, rel=1e-3)


def test_a_real_night_comes_to_its_baseline(real_checkout):
    """Trained, scored, probed and measured on test by the real programs; the hours are used up with it."""
    (real_checkout.folder / "train.py").write_text(small((ROOT / "train.py").read_text()))
    output = real_checkout.agent("--demo", "--budget", "1", "--hours", "0.0001")
    assert "show the loop, not a result" in output
    assert "scored on a quarter of the text" in output and ("sandbox: bubblewrap," in output or not bubblewrap_works())
    (result,) = rows_of(real_checkout, "result", "demo")
    assert 1.5 < result["val_bpb"] < 3 and abs(result["test_bpb"] - result["val_bpb"]) < 0.5 and not result["distrust"]
    assert os.path.exists(real_checkout.folder / "runs" / "demo" / "0000" / "score.json")

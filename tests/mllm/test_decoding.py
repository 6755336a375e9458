"""Greedy answers decoded in slots equal transformers' own `generate`, for every family."""

import types

import pytest
import torch

from domainbed_reasoning.chains.prompts import q_reason
from domainbed_reasoning.mllm import decoding, generation, load_mllm
from domainbed_reasoning.mllm.decoding import Decoder, StepGraphs, can_decode, slots_that_fit

LENGTHS = [3, 9, 1, 20, 12, 2, 14, 7]  # tokens of the eight images' answers


@pytest.fixture(scope="session")
def mllm(family_folder):
    return load_mllm(family_folder).eval()


@pytest.fixture(scope="module")
def pictures():
    return torch.randint(0, 256, (8, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


class Ending:
    """Ends answers after `LENGTHS` tokens at the latest, in the order of the images."""

    closing_tokens = range(1 << 20)

    def __init__(self, mllm):
        self.mllm, self.suppressed_tokens, self.asked = mllm, mllm.generator.suppressed_tokens, []

    def has_ended(self, answer):
        if not any(answer is other for other in self.asked):
            self.asked.append(answer)
        place = next(index for index, other in enumerate(self.asked) if other is answer)
        return len(answer) == LENGTHS[place] or self.mllm.generator.has_ended(answer)


class Eager:
    """Stands in for CUDA graphs, for which every step is computed from tensors alone."""

    def __init__(self):
        self.shapes = []

    def run(self, shape, step):
        self.shapes.append(shape)
        step()


def plain(mllm, pictures, question, most):
    with torch.no_grad():
        return mllm.generator._write_by_transformers(pictures, question, most, do_sample=False)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("graphs", [False, True])
def test_refilled_slots_generate_the_tokens_of_plain_generate(mllm, pictures, class_names, late, graphs):
    """Eight images in three slots, answers of different lengths: each is a prefix of the plain answer."""
    question = q_reason(class_names)
    expected = plain(mllm, pictures, question, 20)
    decoder = Decoder(Ending(mllm), question, 20, 3)
    decoder.late, decoder.graphs = late, Eager() if graphs else None
    written = dict(decoder.write(pictures))
    assert written == {row: expected[row][:length] for row, length in enumerate(LENGTHS)}
    assert decoder.steps < sum(LENGTHS) / 2  # alone, or in batches of three, it would be 65 or 46
    if graphs:
        assert {rows for rows, _ in decoder.graphs.shapes} == {3, 1}
        assert all(length % 128 == 0 or length == decoder.slots.width for _, length in decoder.graphs.shapes)


def test_batch_equals_transformers_generate(mllm, pictures, class_names):
    question = q_reason(class_names)
    assert can_decode(mllm)
    assert mllm.generator.write(pictures, question, 24, do_sample=False) == plain(mllm, pictures, question, 24)


def test_images_are_consumed_as_slots_become_free(folder_of, pictures):
    """At most one image is held beyond those in the slots."""
    mllm, taken, written = load_mllm(folder_of("InternVL")).eval(), [], {}

    def images():
        for row, picture in enumerate(pictures):
            taken.append(row)
            yield picture

    decoder = Decoder(Ending(mllm), "?", 20, 2)
    for row, tokens in decoder.write(images()):
        assert len(taken) <= len(written) + 2 + 1
        written[row] = tokens
    assert taken == sorted(written) == list(range(8))


def test_fewer_images_than_slots_and_none_at_all(folder_of, pictures):
    mllm = load_mllm(folder_of("InternVL")).eval()
    expected = plain(mllm, pictures[:2], "?", 5)
    assert dict(Decoder(mllm.generator, "?", 5, 8).write(pictures[:2])) == dict(enumerate(expected))
    assert not dict(Decoder(mllm.generator, "?", 5, 8).write([]))


def test_sampling_and_unsupported_layers_use_transformers_generate(folder_of, pictures, monkeypatch):
    """Sliding windows in a family without masks for them, and attention without boolean masks."""
    mllm = load_mllm(folder_of("InternVL")).eval()
    text = mllm.base.config.get_text_config()
    monkeypatch.setattr(decoding.Decoder, "write", lambda *given: pytest.fail("decoded in slots"))
    mllm.generate(pictures, "?", 3, temperature=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(text, "_attn_implementation", "flash_attention_2")
        assert not can_decode(mllm)
    with monkeypatch.context() as patch:
        patch.setattr(text, "layer_types", ["sliding_attention"] * text.num_hidden_layers)
        patch.setattr(text, "sliding_window", 8)
        assert not can_decode(mllm)
    assert can_decode(mllm)


def test_dynamic_rope_is_static_up_to_the_trained_length(folder_of, pictures, tmp_path):
    """As InternVL3 has it; transformers would read the positions back in every forward pass."""
    import transformers

    folder = folder_of("InternVL")
    config = transformers.AutoConfig.from_pretrained(folder)
    theta = config.text_config.rope_parameters["rope_theta"]
    config.text_config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": theta}
    transformers.AutoModelForImageTextToText.from_pretrained(folder, config=config).save_pretrained(tmp_path)
    transformers.AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    mllm = load_mllm(str(tmp_path)).eval()
    rope = mllm.base.model.language_model.rotary_emb
    assert rope.rope_type == "dynamic"
    decoder, kinds = Decoder(mllm.generator, "?", 6, 8), []
    assert decoder.ropes == [rope]
    rope.register_forward_hook(lambda *given: kinds.append(rope.rope_type))
    written = dict(decoder.write(pictures))
    assert kinds == ["dynamic"] + ["default"] * 5 and rope.rope_type == "dynamic"
    assert written == dict(enumerate(plain(mllm, pictures, "?", 6)))
    assert not Decoder(mllm.generator, "?", rope.original_max_seq_len, 1).ropes  # would grow


@pytest.fixture
def graphs(monkeypatch):
    """Stand-ins for CUDA graphs: capturing computes nothing, replaying does."""
    capturing = []

    class Graph:
        def replay(self):
            self.step()

    class Capture:
        def __init__(self, graph, pool):
            self.graph = graph

        def __enter__(self):
            capturing.append(self.graph)

        def __exit__(self, *error):
            capturing.clear()

    class Stream(torch.autograd.grad_mode.no_grad):
        def wait_stream(self, other):
            pass

    modes = ["default"]
    names = {"CUDAGraph": Graph, "graph": Capture, "Stream": Stream, "current_stream": Stream}
    names |= {"stream": lambda stream: stream, "graph_pool_handle": object, "set_stream": lambda stream: None}
    names |= {"get_sync_debug_mode": lambda: modes[-1], "set_sync_debug_mode": modes.append}
    for name, value in names.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return capturing


def test_step_is_run_then_captured_and_replayed_per_shape(graphs):
    """Each call computes its step exactly once."""
    computed, captured = [], []

    def step(shape):
        if graphs:
            graphs[0].step = lambda: computed.append(shape)
            captured.append(shape)
        else:
            computed.append(shape)

    steps = StepGraphs()
    for shape in [(4, 128), (4, 128), (2, 128), (4, 128), (2, 128), (2, 128)]:
        steps.run(shape, lambda shape=shape: step(shape))
    assert computed == [(4, 128), (4, 128), (2, 128), (4, 128), (2, 128), (2, 128)]
    assert captured == [(4, 128), (2, 128)]


def test_step_that_cannot_be_captured_runs_eagerly_with_one_warning(graphs):
    computed = []

    def step():
        if graphs:
            raise RuntimeError("operation not permitted when stream is capturing")
        computed.append(1)

    steps = StepGraphs()
    steps.run((4, 128), step)
    with pytest.warns(UserWarning, match="cannot be captured.*not permitted"):
        steps.run((4, 128), step)
    steps.run((4, 128), step)
    steps.run((2, 128), step)
    assert len(computed) == 4


def test_a_step_that_waits_for_the_gpu_is_not_captured(graphs):
    """In a capture it would fail, and leave the allocator in it; the step is run once more, without the ban."""
    computed = []

    def step():
        assert not graphs
        if torch.cuda.get_sync_debug_mode() == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        computed.append(1)

    steps = StepGraphs()
    with pytest.warns(UserWarning, match="cannot be captured.*synchronizing"):
        steps.run((4, 128), step)
    steps.run((4, 128), step)
    steps.run((2, 128), step)
    assert len(computed) == 3 and torch.cuda.get_sync_debug_mode() == "default"


def test_late_read_returns_the_values_at_its_start(monkeypatch):
    """On the CPU there is nothing to wait for; the values may be overwritten at once."""
    from domainbed_reasoning.mllm import transfer

    values = torch.arange(3)
    read = transfer.read_later(values)
    values.zero_()
    assert read() == [0, 1, 2]
    assert transfer.is_asynchronous(types.SimpleNamespace(type="cuda"))
    assert not transfer.is_asynchronous(values.device)


def test_prompts_of_many_tiles_are_prefilled_in_parts(mllm, pictures, class_names, monkeypatch):
    """The same answers, and no more prompts in one pass than fit; each part leaves the other slots as they are."""
    if not can_decode(mllm):
        pytest.skip("this family is decoded by transformers")
    question = q_reason(class_names)
    whole = mllm.generator.write(pictures[:5], question, 12)
    prompt, sizes, core = mllm.prompt(question)["input_ids"].shape[1], [], type(mllm).core

    def watched(self, n, asked, fed, *more, **named):
        if fed.shape[1] == prompt:
            sizes.append(n)
        return core(self, n, asked, fed, *more, **named)

    monkeypatch.setattr(decoding, "_PREFILLED", 2 * prompt + 1)
    monkeypatch.setattr(type(mllm), "core", watched)
    assert mllm.generator.write(pictures[:5], question, 12) == whole
    assert sizes == [2, 2, 1]
    assert decoding.prompts_at_a_time(10**6) == 1


def test_prompts_count_among_what_must_fit(mllm, class_names, monkeypatch):
    """In slots one part of them, otherwise all of them."""
    question = q_reason(class_names)
    row, prompt = mllm.cache_bytes(1, question, 12), decoding.prefill_bytes(mllm, question, 1)
    text, tokens = mllm.base.config.get_text_config(), mllm.prompt(question)["input_ids"].shape[1]
    assert prompt == tokens * (3 * text.intermediate_size + 4 * text.hidden_size) * 4
    monkeypatch.setattr(decoding, "_PREFILLED", 2 * tokens)
    assert mllm.generation_bytes(8, question, 12) == 8 * row + 2 * prompt
    monkeypatch.setattr(generation, "free_memory", lambda device: 2 * prompt + 8 * row * 10 // 7 + 8)
    monkeypatch.setattr(type(mllm), "device", types.SimpleNamespace(type="cuda"))
    assert mllm.generator._fitting(question, 12, 8, in_slots=True) == 8
    with pytest.warns(UserWarning, match="at a time, not 8"):
        assert mllm.generator._fitting(question, 12, 8) < 8


def test_slots_are_halved_until_their_keys_and_values_fit():
    assert slots_that_fit(256, 10, None) == slots_that_fit(256, 10, 256 * 15) == 256
    with pytest.warns(
        UserWarning, match="Generating 64 answers at a time, not 256 .*eval_batch.*: 1,000 bytes are free"
    ):
        assert slots_that_fit(256, 10, 1000) == 64
    with pytest.warns(UserWarning, match="Generating 1 answer at"):
        assert slots_that_fit(64, 10, 0) == 1

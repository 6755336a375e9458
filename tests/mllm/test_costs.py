"""The cost model against PyTorch's operation counts, and the verb `plan`."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from domainbed_reasoning import __main__ as cli
from domainbed_reasoning.chains.prompts import q_cls
from domainbed_reasoning.method.schedule import plan_stages
from domainbed_reasoning.mllm import LoraSettings, ModelError, load_mllm
from domainbed_reasoning.mllm.towers import part_of
from domainbed_reasoning.results import published
from domainbed_reasoning.sweeps import costs
from domainbed_reasoning.sweeps.hours import hours_of, seconds_to_write
from domainbed_reasoning.sweeps.rates import ASSUMED

HPARAMS = {
    "answer": "chain", "both_answers": False, "quantize": "none", "eval_batch": 16, "max_new_tokens": 512,
    "batch_size": 10, "micro_batch": 4, "lora_rank": 8, "gradient_checkpointing": False, "sarr_epochs": 3,
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_operations_and_kept_bytes_are_those_pytorch_counts(model_31m, dtype):
    """One sample's label step: operations within 10% of FlopCounterMode, saved tensors within 30%."""
    mllm = load_mllm(model_31m, lora=LoraSettings(8, 16), dtype=dtype).train()
    question, answer = q_cls(("dog", "cat")) * 4, "a dog " * 40
    mllm.prompt(question)
    kept, weights = {}, {weight.untyped_storage().data_ptr() for weight in mllm.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    image = torch.zeros(1, 3, 48, 48, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            values, mask = mllm.log_likelihoods(mllm.encode(image), question, [answer])
        bytes_kept = sum(size for size, _ in kept.values())
        (values * mask).sum().backward()
    shape = costs.shape_of(model_31m)
    prompt, target = mllm.prompt(question)["input_ids"].shape[1], len(mllm.target(answer))
    lengths = costs.Lengths(prompt - shape.image_tokens, 0, target, 0)
    assert costs.training_flops(shape, lengths, True, False) == pytest.approx(counter.get_total_flops(), rel=0.10)
    itemsize = 4 if dtype == "float32" else 2
    saved = shape.vision.saved_bytes(shape.patches, itemsize)
    saved += shape.language.saved_bytes(prompt + target, itemsize)
    saved += target * shape.vocabulary * (itemsize + 4 + 4)
    assert saved == pytest.approx(bytes_kept, rel=0.30)


def test_image_tokens_are_the_placeholders_of_the_prompt(family_folder):
    mllm = load_mllm(family_folder)
    count = int((mllm.prompt("?")["input_ids"] == mllm.base.config.image_token_id).sum())
    edge = mllm.family.tile_edge(mllm.processor.image_processor)
    assert mllm.family.image_tokens(mllm.base.config, edge) == count
    shape = costs.shape_of(family_folder)
    assert shape.weights == sum(weight.numel() for weight in mllm.parameters())
    linear = {name: module for name, module in mllm.base.named_modules() if isinstance(module, torch.nn.Linear)}
    between = sum(linear[name].weight.numel() for name in linear if part_of(name) == "projector")
    total = sum(layer.weight.numel() for layer in linear.values())
    convolutional = shape.vision.layers == 0  # counted as operations, without weights in linear layers
    assert (0 if convolutional else shape.vision.weights) + shape.language.weights + shape.head + between == total


@pytest.mark.parametrize(
    ("model", "billions", "image_tokens"),
    [
        ("OpenGVLab/InternVL3-8B-hf", 7.94, 256),
        ("OpenGVLab/InternVL3-2B-hf", 2.09, 256),
        ("llava-hf/llava-1.5-7b-hf", 7.06, 576),
    ],
)
def test_the_papers_models_have_their_published_sizes(model, billions, image_tokens):
    shape = costs.shape_of(model)
    assert shape.weights / 1e9 == pytest.approx(billions, abs=0.01)
    assert shape.image_tokens == image_tokens
    assert costs.shape_of(model).tiles == 1


def test_tiles_multiply_the_image(folder_of):
    assert costs.shape_of("OpenGVLab/InternVL3-2B-hf", 4).tiles == 5
    with pytest.raises(ModelError, match="does not tile images"):
        costs.shape_of(folder_of("Gemma3"), 4)


def test_hours_of_a_job_by_hand():
    """10 evaluations cost 10 times one; a batch twice as large is written in half the time where overhead rules."""
    shape, lengths = costs.shape_of("OpenGVLab/InternVL3-2B-hf"), costs.lengths_for(7)
    data, gpu = published.DATA["PACS"], published.GPUS["H200"]
    schedule = plan_stages([3, 3], 10)
    assert (schedule.n_steps, schedule.checkpoint_freq) == (61, 30)
    hours = hours_of(shape, lengths, data, gpu, HPARAMS, schedule, (True, True))
    assert hours.evaluations == 3
    one = hours_of(shape, lengths, data, gpu, HPARAMS, schedule, (True, True), 1)
    assert hours.evaluation == pytest.approx(3 * one.evaluation)
    samples, peak = 61 * 10 * 3, 989e12 * ASSUMED["training_mfu"].value
    computing = samples * costs.training_flops(shape, lengths, True, True) / peak / 3600
    launching = 61 * -(-30 // HPARAMS["micro_batch"]) * (24 + 28) * ASSUMED["layer_overhead"].value / 3600
    assert hours.training == pytest.approx(launching) and launching > computing
    whole = hours_of(shape, lengths, data, gpu, {**HPARAMS, "micro_batch": 30}, schedule, (True, True))
    assert whole.training == pytest.approx(computing)
    faster = seconds_to_write(shape, lengths, gpu, {**HPARAMS, "eval_batch": 32})
    assert 0.5 <= faster / seconds_to_write(shape, lengths, gpu, HPARAMS) < 0.6
    once, voted = (
        hours_of(shape, lengths, data, gpu, {**HPARAMS, **changes}, schedule, (True, True))
        for changes in ({"temperature": 1.0}, {"temperature": 1.0, "votes": 5, "sarr_votes": 5})
    )
    assert once.labeling > 0 and voted.training == once.training
    assert voted.labeling == pytest.approx(5 * once.labeling)
    assert voted.evaluation > 5 * once.evaluation  # votes are sampled: no slots, no CUDA graphs
    sampled = seconds_to_write(shape, lengths, gpu, HPARAMS, greedy=False)
    assert sampled > 3 * seconds_to_write(shape, lengths, gpu, HPARAMS)


def test_hours_count_the_actual_work_of_domainbed_and_the_labeler():
    """Without look-ahead, at most 64 images at a time; the evaluation's chains label the next round at no cost."""
    shape, lengths = costs.shape_of("OpenGVLab/InternVL3-2B-hf"), costs.lengths_for(7)

    def hours(stages=(3, 3, 3), evaluations=None, **changes):
        now = {**HPARAMS, "eval_batch": 64, "sarr_epochs": 3, **changes}
        schedule = plan_stages(list(stages), 10)
        gpu = published.GPUS["H200"]
        return hours_of(shape, lengths, published.DATA["PACS"], gpu, now, schedule, (True, True), evaluations)

    for changes in ({"data_augmentation": True}, {"votes": 3}):
        assert hours(eval_batch=256, **changes).evaluation == hours(**changes).evaluation
    assert hours(eval_batch=256).evaluation < hours().evaluation
    assert hours(eval_batch=16).evaluation > 2 * hours().evaluation
    assert hours().labeling == hours(quantize="nf4").labeling == 0
    for changes in ({"temperature": 0.7}, {"votes": 3}, {"answer": "label"}, {"evaluations": 2}):
        assert hours(**changes).labeling > 0, changes
    assert hours(first_evaluation=2).evaluations == hours().evaluations - 1
    assert hours(evaluations=2, first_evaluation=2).evaluations == 1


def test_memory_shrinks_with_quantization_checkpointing_and_micro_batch():
    shape, lengths = costs.shape_of("OpenGVLab/InternVL3-8B-hf"), costs.lengths_for(65)
    whole = costs.memory_of(shape, lengths, HPARAMS)
    assert whole.weights == pytest.approx(2 * shape.weights)
    assert costs.memory_of(shape, lengths, {**HPARAMS, "quantize": "nf4"}).weights < 0.4 * whole.weights
    less = costs.memory_of(shape, lengths, {**HPARAMS, "gradient_checkpointing": True})
    assert less.activations < 0.3 * whole.activations
    one = costs.memory_of(shape, lengths, {**HPARAMS, "micro_batch": 1})
    assert one.activations == pytest.approx(whole.activations / 4)


def test_plan_shows_evaluation_costs_and_cheaper_settings(capsys):
    assert cli.main(["plan", "--dataset", "OfficeHome", "--gpu", "h200"]) == 0
    printed = capsys.readouterr().out
    assert "with OpenGVLab/InternVL3-8B-hf (7.94 billion weights) on 1 x h200" in printed
    assert "DomainBed evaluates all splits 5 times" in printed
    for part in ("GiB of 131 GiB", "a table", "600 jobs", '"first_evaluation": 2', "error", "assumed"):
        assert part in printed


def test_plan_shows_the_passes_over_each_domain(capsys):
    """9736 · 0.8 = 7789 images of location_38; three epochs of 108 to 119 steps draw 14,000 to 15,400 of them."""
    assert cli.main(["plan", "--dataset", "TerraIncognita"]) == 0
    printed = capsys.readouterr().out
    assert (
        "epoch       with target location_46, an epoch is 115 steps of 43 images from each of 3 source domains"
        in printed
    )
    assert "  location_38         9,736 images   1.9 to 2.1 (12% to 15%)" in printed
    assert (
        "  location_43         3,970 images   3.7 to 5.0 (1% to 2%)" in printed
        and "batch_size 43 is per" not in printed
    )
    assert cli.main(["plan", "--dataset", "DomainNet", "--algorithm", "MTCT"]) == 0
    assert "batch       batch_size 43 is per source domain: 215 images per step from 5" in capsys.readouterr().out
    assert cli.main(["plan", "--dataset", "PACS", "--algorithm", "MLLMZeroShot"]) == 0
    assert "epoch  " not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("algorithm", "hparams", "bound"),
    [("RDMLDG", {"sarr_epoch_over": "kept"}, True), ("RDMLDG", {}, False),
     ("RDMLDG", {"sarr_epoch_over": "kept", "sarr_rounds": 0}, False), ("MTCT", {}, False)],
)  # fmt: skip
def test_plan_says_that_rounds_over_what_is_kept_may_take_fewer_updates(capsys, algorithm, hparams, bound):
    """The share that a round keeps is known only in training, so the hours are those of keeping everything."""
    arguments = ["plan", "--dataset", "PACS", "--algorithm", algorithm, "--hparams", json.dumps(hparams)]
    assert cli.main(arguments) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  training "))
    assert ("if the rounds keep every chain" in line) is bound


def test_plan_reports_too_large_models_and_what_fits(capsys, monkeypatch):
    """The least change that fits: smaller micro-batches for the 2B model, everything for the 8B one."""
    plan = ["plan", "--dataset", "PACSReasoning", "--gpu", "RTX 4090"]
    larger = ["--hparams", '{"micro_batch": 8}']
    assert cli.main([*plan, "--model", "OpenGVLab/InternVL3-2B-hf", *larger]) == 0
    fits = '{"micro_batch": 1, "model": "OpenGVLab/InternVL3-2B-hf"}'
    assert f"TOO LARGE for this GPU. Fits with --hparams '{fits}'" in capsys.readouterr().out
    assert cli.main(plan) == 0
    printed = capsys.readouterr().out
    changes = printed.partition("Fits with --hparams '")[2].partition("'")[0]
    assert cli.main([*plan, "--hparams", changes]) == 0
    fits = capsys.readouterr().out
    assert "TOO LARGE" in printed and "TOO LARGE" not in fits
    # The hours are those of what fits, and say so; of what does not fit at all there are none.
    assert printed.partition("with these hyper-parameters\n\n")[2].split("cheaper")[0] in fits
    assert "with these hyper-parameters" not in fits
    monkeypatch.setitem(published.GPUS, "L4", published.Gpu(1, 121, 0.3e12))
    assert cli.main([*plan, "--gpu", "L4"]) == 0
    printed = capsys.readouterr().out
    assert (
        "TOO LARGE for this GPU with any hyper-parameters" in printed
        and "hours" not in printed
        and "sweep" not in printed
    )


def test_what_plan_prints_can_be_planned_and_keeps_the_users_hparams(capsys):
    """NF4 on 22 GiB: activations are too large, and 128 answers at a time fit."""
    plan = ["plan", "--dataset", "PACS", "--gpu", "RTX4090", "--json", "--hparams"]
    own = {"quantize": "nf4", "sarr_rounds": 1}
    assert cli.main([*plan, json.dumps(own)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fixes"] == {"micro_batch": 1} and found["hparams"]["eval_batch"] == 128
    assert all(change["hparams"].items() >= (own | found["fixes"]).items() for change in found["cheaper"])
    printed = [(change["hparams"], change["hours"]) for change in found["cheaper"]]
    for hparams, hours in [(own | found["fixes"], found["hours"]["job"]), *printed]:
        assert cli.main([*plan, json.dumps(hparams)]) == 0
        again = json.loads(capsys.readouterr().out)
        assert not again["fixes"] and again["hours"]["job"] == pytest.approx(hours)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "OficeHome"], "Did you mean 'OfficeHome'"),
        (["--dataset", "PACS", "--gpu", "H2000"], "Unknown GPU 'H2000'. Available: H200"),
        (["--dataset", "PACS", "--algorithm", "MTCTT"], "Did you mean 'MTCT'"),
        (["--dataset", "PACS", "--algorithm", "CLIPLoRA"], "not an MLLM algorithm"),
        (["--dataset", "PACS", "--hparams", '{"sar_rounds": 1}'], "Did you mean 'sarr_rounds'"),
    ],
)
def test_plan_reports_invalid_options(capsys, arguments, message):
    assert cli.main(["plan", *arguments]) == 1
    assert message in capsys.readouterr().err

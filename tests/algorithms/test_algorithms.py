"""Every MLLM algorithm on the embedded model and benchmark, driven as DomainBed's train script drives it."""

import functools
import json
import math

import pytest
import torch
from domainbed import hparams_registry

from builders import training
from builders.chat import chat_inputs
from builders.training import minibatches
from domainbed_reasoning import registry
from domainbed_reasoning.bridge.samples import ids_of
from domainbed_reasoning.images import shapes
from domainbed_reasoning.jobs import progress as progress
from domainbed_reasoning.method.self_labeling import SelfLabels

NAMES = [name for name in registry.ALGORITHMS if not name.startswith("CLIP")]
TRAINED = [name for name in NAMES if name != "MLLMZeroShot"]


build = functools.partial(training.build, max_new_tokens=40)


def adapters(algorithm):
    return {name: weight.detach().clone() for name, weight in algorithm.mllm.adapters().items()}


@pytest.mark.parametrize("name", TRAINED)
def test_the_loss_falls_and_only_adapters_move(name):
    dataset, algorithm = build(name, lr_schedule="constant", lr=0.01, sarr_rounds=0)
    frozen = {key: weight.clone() for key, weight in algorithm.named_parameters() if not weight.requires_grad}
    batch = minibatches(dataset)
    before = adapters(algorithm)
    losses = [algorithm.update(batch)["loss"] for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]
    assert all(not torch.equal(weight, before[key]) for key, weight in adapters(algorithm).items() if "lora_B" in key)
    for key, weight in algorithm.named_parameters():
        if key in frozen:
            assert torch.equal(weight, frozen[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_step_values_are_plain_floats_that_json_holds(name):
    dataset, algorithm = build(name)
    values = algorithm.update(minibatches(dataset, size=2))
    assert json.loads(json.dumps(values)) == values
    assert all(type(value) is float and math.isfinite(value) for value in values.values())
    assert values["stage"] == 0.0


@pytest.mark.parametrize("answer", ["chain", "label"])
@pytest.mark.parametrize("name", NAMES)
def test_predict_scores_every_class(name, answer):
    dataset, algorithm = build(name, answer=answer)
    x = minibatches(dataset, size=5)[0][0]
    scores = algorithm.predict(x)
    assert scores.shape == (5, dataset.num_classes)
    assert scores.isfinite().all()


@pytest.mark.parametrize("dataset_name", ["Debug28", "Debug224"])
@pytest.mark.parametrize("name", registry.ALGORITHMS)
def test_debug_datasets_work_without_ids_names_and_chains(name, dataset_name):
    dataset, algorithm = build(name, dataset_name, test_envs=())
    batch = [
        (torch.stack([env[i][0] for i in range(4)]), torch.stack([env[i][1] for i in range(4)])) for env in dataset
    ]
    for _ in range(2):
        assert algorithm.update(batch) is not None
    algorithm.eval()
    assert algorithm.predict(batch[0][0]).shape == (4, dataset.num_classes)


def naive_losses(algorithm, batch):
    """Equation 1 from plain transformers calls: two sequences an image, every logit, only the prompts are ours."""
    from PIL import Image

    mllm, task = algorithm.mllm, algorithm.task
    total = torch.zeros(())
    count = 0
    for x, y in batch:
        for image, label, (env, index) in zip(x.as_subclass(torch.Tensor), y.tolist(), ids_of(x).tolist(), strict=True):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            for question, answer in (
                (algorithm.q_cls, task.class_names[label]),
                (algorithm.q_reason, shapes.chain(env, index)),
            ):
                inputs = chat_inputs(mllm.processor, picture, question, crop_to_patches=False)
                target = mllm.tokenizer(answer + "<|im_end|>", add_special_tokens=False, return_tensors="pt").input_ids
                ids = torch.cat([inputs["input_ids"], target], dim=1)
                logits = mllm.network(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0]
                first = inputs["input_ids"].shape[1]
                nll = torch.nn.functional.cross_entropy(logits[first - 1 : -1], target[0], reduction="none")
                total = total + (nll.sum() if question == algorithm.q_cls else nll.mean())
            count += 1
    return total / count


def gradients(algorithm):
    return {name: weight.grad.clone() for name, weight in algorithm.mllm.adapters().items()}


def test_mtct_equals_equation_1_computed_naively_in_loss_and_every_gradient():
    """Two separate sequences an image through plain transformers calls, within 1e-5 in float32."""
    dataset, algorithm = build("MTCT", test_envs=(3,))
    with torch.no_grad():
        for name, weight in algorithm.mllm.adapters().items():
            if "lora_B" in name:
                weight.normal_(std=0.02)  # away from zero, so that every adapter has a gradient
    batch = minibatches(dataset, size=2)
    own = adapters(algorithm)
    expected = naive_losses(algorithm, batch)
    expected.backward()
    naive = gradients(algorithm)
    values = algorithm.update(batch)
    assert values["loss"] == pytest.approx(float(expected.detach()), abs=1e-5)
    assert values["loss"] == pytest.approx(values["label_loss"] + values["chain_loss"], rel=1e-6)
    moved = adapters(algorithm)
    for name, weight in gradients(algorithm).items():
        torch.testing.assert_close(weight, naive[name], rtol=1e-5, atol=1e-5)
        assert weight.abs().max() > 0
        assert not torch.equal(moved[name], own[name])


def test_micro_batches_give_the_update_of_the_whole_batch():
    moved = []
    for size in (64, 4, 1):
        dataset, algorithm = build("MTCT", micro_batch=size)
        algorithm.task.chains.pop((0, 1))  # a sample with a label term alone
        algorithm.update(minibatches(dataset))
        moved.append(gradients(algorithm))
    for other in moved[1:]:
        for name, weight in other.items():
            torch.testing.assert_close(weight, moved[0][name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("off", "twin"), [("chain_weight", "LabelSFT"), ("label_weight", "ReasoningSFT")])
def test_without_one_term_mtct_is_the_single_path_method(off, twin):
    dataset, mtct = build("MTCT", **{off: 0.0})
    _, single = build(twin)
    mtct.update(minibatches(dataset))
    single.update(minibatches(dataset))
    for name, gradient in gradients(single).items():
        torch.testing.assert_close(gradient, gradients(mtct)[name], rtol=1e-4, atol=1e-5)


def test_images_without_a_chain_give_their_label_term_alone():
    """Of 12 images 3 have a chain: the loss is the label term of 12 and a quarter of the chain mean of 3."""
    dataset, algorithm = build("MTCT")
    batch = minibatches(dataset)
    keep = {(env, 0) for env in range(3)}
    for key in [key for key in algorithm.task.chains if key not in keep]:
        del algorithm.task.chains[key]
    values = algorithm.update(batch)
    assert values["chain_share"] == 0.25
    assert values["loss"] == pytest.approx(values["label_loss"] + 0.25 * values["chain_loss"], rel=1e-5)


def test_reasoning_alone_does_not_use_images_without_a_chain():
    dataset, algorithm = build("ReasoningSFT")
    algorithm.task.chains.clear()
    before = adapters(algorithm)
    assert algorithm.update(minibatches(dataset))["loss"] == 0.0
    for name, weight in adapters(algorithm).items():
        assert torch.equal(weight, before[name])


def test_a_step_without_a_chain_moves_the_schedule_on():
    """The rate of step t is the schedule's at t, whichever of the steps before it had anything to learn from."""
    rates = []
    for empty in (False, True):
        dataset, algorithm = build("ReasoningSFT")
        if empty:
            algorithm.task.chains.clear()
        for start in range(3):
            algorithm.update(minibatches(dataset, size=1, start=start))
        rates.append(algorithm.run.lr_scheduler.get_last_lr())
    assert rates[0] == rates[1]


@pytest.mark.parametrize("name", ["SARR", "RDMLDG"])
def test_a_round_trains_on_the_models_own_kept_chains_and_reports_their_share(name, capsys, monkeypatch):
    """Stages of one step each. The labeller's chains are replaced by known ones: every second names the true class."""
    dataset, algorithm = build(name, mtct_epochs=1, sarr_epochs=1, sarr_rounds=2)
    algorithm.schedule = algorithm.schedule.__class__(
        tuple(stage.__class__(stage.round, i, i) for i, stage in enumerate(algorithm.schedule.stages)), 3, 1
    )
    batch = minibatches(dataset, size=2)
    labels = [int(label) for _, y in batch for label in y]
    answers = [shapes.CLASS_NAMES[label if i % 2 == 0 else (label + 1) % 7] for i, label in enumerate(labels)]
    chains = [f"<CONCLUSION>{answer}</CONCLUSION>" for answer in answers]
    monkeypatch.setattr(
        type(algorithm), "labeler", lambda self: SelfLabels(lambda images: list(chains), self.task.class_names)
    )
    assert "sarr1_accepted" not in algorithm.update(batch)
    trained_on = []
    likelihoods = algorithm.mllm.log_likelihoods
    monkeypatch.setattr(
        algorithm.mllm, "log_likelihoods", lambda e, q, a: trained_on.append((q, list(a))) or likelihoods(e, q, a)
    )
    both = algorithm.mllm.two_path_log_likelihoods
    monkeypatch.setattr(
        algorithm.mllm,
        "two_path_log_likelihoods",
        lambda e, q, a: trained_on.extend(zip(q, map(list, a), strict=True)) or both(e, q, a),
    )
    values = algorithm.update(batch)
    assert values["stage"] == 1.0
    assert values["sarr1_accepted"] == values["chain_share"] == 0.5
    kept = [text for question, texts in trained_on if question == algorithm.q_reason for text in texts]
    assert sorted(kept) == sorted(chains[::2])  # the model's own, not the teacher's; rejected ones not at all
    named = [text for question, texts in trained_on if question == algorithm.q_cls for text in texts]
    assert sorted(named) == (sorted(answers[::2]) if name == "RDMLDG" else [])
    assert algorithm.update(batch)["stage"] == 2.0
    assert "SARR round 1" in capsys.readouterr().out


def test_the_labeler_of_a_round_stays_the_model_of_the_rounds_start():
    dataset, algorithm = build("RDMLDG")
    algorithm.update(minibatches(dataset))
    labeller = algorithm.labeler()
    images = torch.cat([x for x, _ in minibatches(dataset)]).as_subclass(torch.Tensor)
    before = labeller.write(images)
    with torch.no_grad():
        for weight in algorithm.mllm.adapters().values():
            weight.add_(0.05)
    assert labeller.write(images) == before
    assert algorithm.mllm.generate(images, algorithm.q_reason, 40) != before


def test_a_labeler_without_room_for_a_copy_writes_the_same_chains(monkeypatch):
    dataset, algorithm = build("RDMLDG")
    algorithm.update(minibatches(dataset))
    images = torch.cat([x for x, _ in minibatches(dataset)]).as_subclass(torch.Tensor)
    with_copy = algorithm.labeler().write(images)
    monkeypatch.setattr(type(algorithm.mllm), "fits_a_copy", lambda self, *bytes: False)
    monkeypatch.setattr(type(algorithm.mllm), "copy_for_inference", lambda self: pytest.fail("a copy was made"))
    algorithm.snapshots.labels_by_copy = None
    assert algorithm.labeler().write(images) == with_copy


def test_a_checkpoint_holds_adapters_alone_and_brings_the_answers_back():
    dataset, algorithm = build("MTCT")
    algorithm.update(minibatches(dataset))
    state = algorithm.state_dict()
    assert sum(weight.numel() for weight in state.values()) < 0.1 * sum(w.numel() for w in algorithm.parameters())
    x = minibatches(dataset)[0][0]
    _, fresh = build("MTCT", answer="label")
    algorithm.hparams["answer"] = "label"
    assert not torch.equal(fresh.predict(x), algorithm.predict(x))
    fresh.load_state_dict(state)
    torch.testing.assert_close(fresh.predict(x), algorithm.predict(x))


def test_checkpoint_of_another_rank_is_rejected():
    _, algorithm = build("MTCT")
    _, zero_shot = build("MLLMZeroShot")
    with pytest.raises(ValueError, match="do not match this model"):
        algorithm.load_state_dict(zero_shot.state_dict())


def test_before_the_first_evaluation_asked_for_scores_are_alike_and_nothing_is_generated(monkeypatch):
    dataset, algorithm = build("MTCT", first_evaluation=2)
    x = minibatches(dataset, size=5)[0][0]
    monkeypatch.setattr(type(algorithm.mllm), "generate", lambda *given: pytest.fail("a chain was written"))
    algorithm.update(minibatches(dataset, size=1))
    assert algorithm.predict(x).tolist() == [[0.0] * 7] * 5
    monkeypatch.undo()
    algorithm.update(minibatches(dataset, size=1))
    assert algorithm.predict(x).sum() == pytest.approx(5)


def test_an_algorithm_of_one_step_answers_whatever_evaluation_is_to_be_the_first():
    """One sweep has one --hparams for all its algorithms."""
    dataset, algorithm = build("MLLMZeroShot", first_evaluation=2)
    algorithm.update(minibatches(dataset, size=1))
    assert algorithm.predict(minibatches(dataset, size=5)[0][0]).sum() == pytest.approx(5)


def test_balanced_gradients_are_the_chains_and_the_labels_at_equal_norm():
    """MTCT's gradient is the chain's alone plus the label's alone, scaled; micro-batches change nothing."""
    dataset, balanced = build("MTCT", gradient_balance="norm")
    _, by_parts = build("MTCT", gradient_balance="norm", micro_batch=5)
    singles = {}
    for name in ("LabelSFT", "ReasoningSFT"):
        _, algorithm = build(name)
        algorithm.update(minibatches(dataset))
        singles[name] = gradients(algorithm)
    label, chain = singles["LabelSFT"], singles["ReasoningSFT"]

    def norm(parts):
        return torch.stack([gradient.norm() for gradient in parts.values()]).norm()

    factor = float(norm(chain) / norm(label))
    for algorithm in (balanced, by_parts):
        values = algorithm.update(minibatches(dataset))
        assert values["label_scale"] == pytest.approx(factor, rel=1e-3)
        assert values["label_loss"] > 0
        for name, gradient in gradients(algorithm).items():
            torch.testing.assert_close(gradient, chain[name] + factor * label[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["answer", "labeling"])
def test_of_sampled_chains_the_majoritys_is_taken(name, monkeypatch):
    """Three chains an image, drawn at the temperature of the votes: wug, dax, wug make wug."""
    dataset, algorithm = build("SARR", votes=3, vote_temperature=0.9, sarr_votes=3, temperature=0.6, top_p=0.8)
    drawn, asked = iter(["wug", "dax", "wug"]), []

    def generate(self, images, question, max_new_tokens, *sampling):
        asked.append((max_new_tokens, *sampling))
        return [f"<CONCLUSION>{answer}</CONCLUSION>" for answer in [next(drawn)] * len(images)]

    monkeypatch.setattr(type(algorithm.mllm), "generate", generate)
    x = minibatches(dataset, size=2)[0][0]
    wug = shapes.CLASS_NAMES.index("wug")
    if name == "answer":
        assert algorithm.predict(x).argmax(1).tolist() == [wug, wug]
        assert asked == [(40, 0.9)] * 3
    else:
        chains = algorithm.labeler().chains_for(x.as_subclass(torch.Tensor), [wug, 0], None)
        assert chains == ["<CONCLUSION>wug</CONCLUSION>", None]
        assert asked == [(40, 0.6, 0.8)] * 3


def test_the_consistency_filter_keeps_some_of_what_the_paper_keeps_and_nothing_else():
    dataset, algorithm = build("RDMLDG")
    for step in range(12):
        algorithm.update(minibatches(dataset, start=step))
    images = torch.cat([x for x, _ in minibatches(dataset, size=42)]).as_subclass(torch.Tensor)
    labels = [int(label) for _, y in minibatches(dataset, size=42) for label in y]
    by_conclusion = algorithm.labeler().chains_for(images, labels, None)
    algorithm.hparams["sarr_filter"] = "consistent"
    consistent = algorithm.labeler().chains_for(images, labels, None)
    assert all(chain in (None, kept) for chain, kept in zip(consistent, by_conclusion, strict=True))
    kept = sum(chain is not None for chain in by_conclusion)
    assert 0 < sum(chain is not None for chain in consistent) < kept


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rnak": 8}, "lora_rnak.*Did you mean 'lora_rank'"),
        ({"model": "no-such-model"}, "neither a folder nor a hub id"),
        ({"answer": "both"}, "answer must be 'chain' or 'label'; got 'both'"),
        ({"quantize": "int3"}, "quantize must be 'none', 'nf4' or 'int8'; got 'int3'"),
        ({"lora_targets": "all"}, "lora_targets must be 'both', 'vision' or 'language'; got 'all'"),
        ({"lr_schedule": "step"}, "lr_schedule must be 'constant', 'linear' or 'cosine'; got 'step'"),
        ({"lr": -1.0}, "lr must be a number above 0; got -1.0"),
        ({"lr": "1e-3"}, "lr must be a number above 0; got '1e-3'"),
        ({"dtype": "float8"}, "dtype must be 'auto', 'float32', 'bfloat16' or 'float16'; got 'float8'"),
        ({"gradient_balance": "on"}, "gradient_balance must be 'none' or 'norm'; got 'on'"),
        ({"chain_weighting": "loss"}, "chain_weighting must be 'constant' or 'falling_loss'; got 'loss'"),
        ({"on_parse_failure": "skip"}, "on_parse_failure must be 'label' or 'wrong'; got 'skip'"),
        ({"sarr_epoch_over": "some"}, "sarr_epoch_over must be 'all' or 'kept'; got 'some'"),
        ({"sarr_filter": True}, "sarr_filter must be 'conclusion', 'well_formed' or 'consistent'; got True"),
        ({"votes": 2.0}, "votes must be an integer from 1 to .*; got 2.0"),
        ({"votes": 3, "vote_temperature": 0.0}, "3 greedy chains are identical; set vote_temperature"),
        ({"rho": 1.5}, r"rho must be a number in \[0, 1\]; got 1.5"),
        ({"target_per_class": 0}, "target_per_class must be an integer from 1 to .*; got 0"),
        ({"teacher": "odd"}, "teacher must be 'own' or 'other'; got 'odd'"),
    ],
)
def test_invalid_hparams_are_rejected_before_training_with_a_fix(changes, message):
    with pytest.raises(ValueError, match=message):
        build("MTCT", **changes)


def test_float16_answers_and_does_not_train():
    """No loss is scaled. A job that is only asked trains nothing."""
    with pytest.raises(ValueError, match="float16 is for evaluation only.*bfloat16 or float32, or quantize nf4"):
        build("MTCT", dtype="float16")
    assert build("MLLMZeroShot", dtype="float16")[1].mllm.base.dtype == torch.float16


def test_zero_shot_takes_one_step_and_changes_nothing():
    dataset, algorithm = build("MLLMZeroShot")
    assert dataset.N_STEPS == 1
    before = {key: weight.clone() for key, weight in algorithm.named_parameters()}
    algorithm.update(minibatches(dataset))
    assert all(torch.equal(weight, before[key]) for key, weight in algorithm.named_parameters())
    assert algorithm.state_dict() == {}


def test_self_labeling_by_vote_needs_a_temperature():
    with pytest.raises(ValueError, match="5 greedy chains are identical; set temperature"):
        build("SARR", sarr_votes=5)


@pytest.mark.parametrize("name", NAMES)
def test_the_defaults_are_the_papers(name):
    """Everything beyond the paper is off."""
    beyond = {
        "votes": 1, "sarr_votes": 1, "sarr_filter": "conclusion", "gradient_balance": "none", "first_evaluation": 0,
        "chain_weighting": "constant", "sarr_epoch_over": "all", "on_parse_failure": "label", "label_weight": 1.0,
        "chain_weight": 1.0,
    }  # fmt: skip
    defaults = hparams_registry.default_hparams(name, "PACSReasoning")
    assert {key: defaults.get(key, value) for key, value in beyond.items()} == beyond


@pytest.mark.parametrize("name", NAMES)
def test_random_search_draws_plain_values_and_states_every_source(name):
    drawn = [hparams_registry.random_hparams(name, "PACSReasoning", seed) for seed in range(1, 6)]
    assert json.loads(json.dumps(drawn)) == drawn
    table = registry.load(registry.ALGORITHMS[name]).HPARAMS
    assert all(hparam.source for hparam in table.values())
    defaults = hparams_registry.default_hparams(name, "PACSReasoning")
    assert defaults["model"] == "OpenGVLab/InternVL3-8B-hf"
    if name != "MLLMZeroShot":
        assert defaults["lr"] == 5e-4 and defaults["lora_rank"] == 8 and defaults["mtct_epochs"] == 3
        assert len({values["lr"] for values in drawn}) == 5


def test_non_finite_loss_stops_the_job_with_a_fix():
    dataset, algorithm = build("MTCT", grad_clip=0.0)
    algorithm.update(minibatches(dataset))
    with torch.no_grad():
        next(iter(algorithm.mllm.adapters().values())).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"Step 1: loss is nan: .*a smaller lr .*grad_clip 1"):
        algorithm.update(minibatches(dataset))
    assert algorithm.session.steps_taken == 1


def test_progress_is_printed_once_a_minute(monkeypatch, capsys):
    now = iter([0.0, 30.0, 61.0, 90.0, 122.0, 200.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    beat = progress.ProgressLog("Evaluation after 3 of 9 updates", 100, "image")
    for _ in range(4):
        beat.add(20, 10.0)
    beat.add(20, 10.0)  # the last: it is over
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("Evaluation after 3 of 9 updates: ") and " 40/100 [00:20<00:30,  2.00image/s]" in first
    assert " 80/100 [00:40<00:10,  2.00image/s]" in second

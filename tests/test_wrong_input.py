"""More invalid input: each is a one-line error before any training (see also test_refusals)."""

import pytest
from transformers import BitsAndBytesConfig

from trl_opd import OPDConfig

from tests.helpers.rock_sets import rock_file
from tests.helpers.tiny import FOUR_BIT, make_model, save
from tests.helpers.trainers import build


def message_of_one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_unknown_dtype_is_a_one_line_error(tmp_path):
    kwargs = {"dtype": "float99"}
    with pytest.raises(ValueError, match="torch dtype such as 'bfloat16', got 'float99'") as error:
        build(tmp_path, teacher="anything", teacher_model_init_kwargs=kwargs)
    message_of_one_line(error)
    assert kwargs == {"dtype": "float99"}


@pytest.mark.parametrize("number", ["4 x 2", "2 x 3"])
def test_indivisible_number_of_rollouts_names_every_factor(tmp_path, number):
    batch, accumulation = map(int, number.split(" x "))
    changes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    with pytest.raises(ValueError, match=f"The {batch * accumulation} rollouts") as error:
        build(tmp_path, num_generations=5, **changes)
    message = message_of_one_line(error)
    assert f"per_device_train_batch_size {batch} x 1 processes" in message
    assert f"gradient_accumulation_steps {accumulation}" in message
    assert "num_generations=5" in message


def test_folder_without_a_rock_set_is_an_error(tmp_path):
    with pytest.raises(OSError, match=r"No rock set at .*rock_set\.json"):
        build(tmp_path, rock_set=str(tmp_path))


@pytest.mark.slow
def test_two_models_with_equal_weights_are_accepted(tmp_path):
    trainer = build(tmp_path, make_model(seed=0), make_model(seed=0), max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.0, abs=1e-6)


def test_quantised_student_without_adapter_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="purely quantized models"):
        build(tmp_path, save(tmp_path / "student", seed=0), quantization_config=BitsAndBytesConfig(**FOUR_BIT))


@pytest.mark.parametrize("settings", [{"token_weighting": "control"}, {"token_weighting": "random"}])
def test_every_weighting_but_uniform_needs_a_rock_set(tmp_path, settings):
    with pytest.raises(ValueError, match=f"token_weighting='{settings['token_weighting']}' needs a rock set") as error:
        OPDConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)
    message_of_one_line(error)


def test_greedy_rollouts_are_allowed_at_temperature_one(tmp_path):
    build(tmp_path, generation_kwargs={"do_sample": False}, temperature=1.0)
    build(tmp_path, generation_kwargs={"do_sample": True}, temperature=0.7)


def test_rocks_with_more_tokens_than_their_corpus_are_an_error(tmp_path):
    corpus = {"rollouts": 4, "tokens": 100, "kl_sum": 30.0}
    rocks = rock_file(tmp_path / "rocks.json", range(60, 72), corpus=corpus)  # 12 of count 10: a share of 1.2
    with pytest.raises(ValueError, match="tokens"):
        build(tmp_path, rock_set=rocks, token_weighting="random")

"""The model card of a student has the numbers of its run, and shows the texts of others as text only."""

import json

import pytest
import yaml
from markdown_it import MarkdownIt

from trl_opd.report.card import render_card
from trl_opd.rocks.rock_set import Controls, Rock, RockSet
from trl_opd.saving.student import write_card

from tests.helpers.report_folders import SUMMARY
from tests.helpers.run_records import record

HOSTILE = (
    "<script>alert(1)</script>",
    "a | b",
    "`x`",
    "[l](javascript:x)",
    "\u202e",
    "# head",
    "\x00",
    "&lt;",
    "![i](x)",
)


def rock_set(texts=("So", " the", "\n")) -> RockSet:
    rocks = [Rock(place, text, 100 - place, 0.5, 50.0 - place, family="other") for place, text in enumerate(texts)]
    tokenizer = {"name": None, "vocab_size": 50_000, "fingerprint": None}
    measure, method = {"divergence": "reverse_kl", "temperature": 1.0}, {"score": "aggregate", "top_k": 100}
    corpus = {"rollouts": 10, "tokens": 1000, "kl_sum": 500.0}
    held = {"token_share": 0.21, "kl_share": 0.43}
    return RockSet(rocks, tokenizer, measure, method, corpus, Controls([40_000], 0.97, True), held)


def card_of(path, content: dict | None = None, rocks: RockSet | None = None, **settings) -> str:
    (path / "opd_run.json").write_text(json.dumps(content or record()))
    if rocks is not None:
        rocks.save(path / "rock_set.json")
    return render_card(path, name="student", repo_id="me/student", **settings).content


def shown(card: str) -> str:
    """Return what a reader of the rendered Markdown sees, as HTML."""
    return MarkdownIt("gfm-like", {"linkify": False}).render(card.split("---\n", 2)[2])


def test_numbers_are_those_of_the_run(tmp_path):
    html = shown(card_of(tmp_path, rocks=rock_set()))
    for text in (
        "accuracy before the first step: 0.100 [0.050, 0.200]",
        "accuracy after step 20: 0.500 [0.400, 0.600]",
        "on 100 problems",
        "1.5000 nats",
        "0.7500 at the last (no interval)",
        "the rock types of the rock set, weight 0.25 in the loss; 30.0% of the tokens had weight 0 (no interval)",
        "me/teacher, 5.00 billion parameters, bfloat16, 4-bit nf4",
        "21.0 % of the tokens and\n43.0 % of the divergence",
        "1 other types, which together occur 0.97 times as often as the rocks",
        "No published result shows that freezing rocks raises accuracy",
    ):
        assert text in html, text


def test_metadata_names_base_model_dataset_and_tags(tmp_path):
    data = yaml.safe_load(card_of(tmp_path, tags=["mine", "trl"]).split("---\n")[1])
    assert data["base_model"] == "me/base"
    assert data["datasets"] == ["me/prompts"] or data["datasets"] == "me/prompts"
    assert data["tags"].count("trl") == 1
    assert "mine" in data["tags"]


@pytest.mark.parametrize("name", ["/home/me/models/base", None, "", "tiny/student.jsonl", "here/base"])
def test_base_model_that_is_not_on_the_hub_is_neither_link_nor_path(tmp_path, monkeypatch, name):
    (tmp_path / "here" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    card = card_of(tmp_path, record(student=record()["student"] | {"name": name}))
    assert "base_model" not in card.split("---\n")[1]
    assert "/home/me" not in card


def test_model_in_a_folder_is_named_without_its_path(tmp_path):
    models = {name: record()[name] | {"name": f"/home/me/secret/{name}-model"} for name in ("student", "teacher")}
    card = card_of(tmp_path, record(**models))
    assert "secret" not in card
    assert card.count("teacher-model") == 2
    assert "student-model" in card


def test_run_without_evaluation_says_so(tmp_path):
    html = shown(card_of(tmp_path, record(log=[{"step": 1, "loss": 0.5}], arguments={})))
    assert "Its accuracy was not measured during training." in html
    assert "This run used no rock set" in html
    assert "all tokens weigh the same" in html


def test_first_twenty_rocks_are_listed_in_order(tmp_path):
    html = shown(card_of(tmp_path, rocks=rock_set([f"token{place}" for place in range(30)])))
    assert html.index("token0<") < html.index("token19<")
    assert "token20" not in html
    assert "30 were chosen" in html


def test_rocks_of_another_run_are_not_listed(tmp_path):
    mine = shown(card_of(tmp_path, record(rocks=[0, 1, 2]), rock_set()))
    assert "3 were chosen" in mine
    html = shown(card_of(tmp_path, record(rocks=[0, 1]), rock_set()))
    assert "is no longer in its folder" in html
    assert "were chosen" not in html
    (tmp_path / "rock_set.json").unlink()
    assert "is no longer in its folder" in shown(card_of(tmp_path, record(rocks=[0, 1])))


def test_arms_of_a_demo_are_compared(tmp_path):
    difference = {"estimate": -0.25, "ci95": [-0.3, -0.2], "over": "problems"}
    summary = SUMMARY | {"differences": {"rock": difference}}
    (tmp_path / "rock").mkdir()
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    html = shown(card_of(tmp_path / "rock"))
    assert "<strong>rock</strong>" in html
    assert "<td>-0.250 [-0.300, -0.200]</td>" in html
    assert "<td>0.750 [0.400, 0.600]</td>" in html
    (tmp_path / "other").mkdir()
    assert "The arms of the experiment" not in shown(card_of(tmp_path / "other"))


def test_hostile_texts_are_only_text(tmp_path):
    content = record(
        command=f"trl-opd train ``` {HOSTILE[0]}",
        teacher=record()["teacher"] | {"name": "".join(HOSTILE)},
        versions={"python": HOSTILE[0]},
        dataset={"name": "".join(HOSTILE), "rows": 1},
    )
    html = shown(card_of(tmp_path, content, rock_set(HOSTILE), tags=["a: b"]))
    for bad in ("<script", "<img", 'javascript:x"', "\u202e", "\x00", "<h1>head"):
        assert bad not in html, bad
    assert html.count("<h1>") == 1
    assert html.count("<tr>") == shown(card_of(tmp_path, record(), rock_set([f"t{i}" for i in range(9)]))).count("<tr>")


@pytest.mark.parametrize("text", ["{", json.dumps({"format": "trl_opd.run", "version": 2}), ""])
def test_broken_record_is_a_warning_and_keeps_the_old_card(tmp_path, text):
    (tmp_path / "opd_run.json").write_text(text)
    (tmp_path / "README.md").write_text("mine")
    with pytest.warns(UserWarning, match=r"The card of .* cannot be written: .*opd_run.json"):
        write_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".part")] == []


def test_folder_without_a_run_is_an_error(tmp_path):
    rock_set().save(tmp_path / "rock_set.json")
    with pytest.raises(ValueError, match="holds no run of trl_opd"):
        render_card(tmp_path, name=None, repo_id=None)

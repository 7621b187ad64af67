"""The report: complete and self-contained with everything there, and with parts missing."""

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

from megatron_mm.report.charts import expert_lift
from megatron_mm.report.page import accuracy_table, main, write_report

SKILLS = {
    "ocr": {"accuracy": 0.964, "chance": 0.1, "n": 500},
    "count": {"accuracy": 0.871, "chance": 0.25, "n": 500},
    "color & place": {"accuracy": 0.792, "chance": 0.167, "n": 500},
    "multihop/steps": {"accuracy": 0.583, "chance": 0.1, "n": 1200},
}


def make_run(path, steps: int = 300):
    """A run directory as the trainer leaves it, with made-up numbers."""
    random = np.random.default_rng(0)
    path.mkdir(parents=True, exist_ok=True)
    with (path / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            record = {
                "iteration": step,
                "train/lm_loss": 0.1 + 3 * np.exp(-step / 80) * random.uniform(0.9, 1.1),
                "moe/load_balancing_loss": 1 + 0.5 * np.exp(-step / 50) + random.uniform(0, 0.05),
                "train/grad_norm": random.uniform(0.3, 1.5),
                "train/learning_rate": 1e-3 * (1 - step / steps),
                "train/consumed_samples": 64 * step,
            }
            if step % 50 == 0:
                for name, skill in SKILLS.items():
                    record[f"accuracy/{name}"] = skill["accuracy"] * (1 - np.exp(-step / 90))
            file.write(json.dumps(record) + "\n")
    results = {
        "skills": SKILLS,
        "iteration": steps,
        "parameters": 1_200_000,
        "layout": {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 2},
        "stages": ["G E L V G E", "J * E Q C E"],
        "seconds": 400,
    }
    (path / "results.json").write_text(json.dumps(results))
    examples = []
    for index, key in enumerate(SKILLS):
        image = Image.new("RGB", (56, 56), (24, 26, 32))
        draw = ImageDraw.Draw(image)
        for _ in range(5):
            x, y = random.integers(2, 44, 2)
            color = tuple(int(c) for c in random.integers(90, 255, 3))
            draw.text((x, y), str(random.integers(10)), fill=color)
        (path / "images").mkdir(exist_ok=True)
        image.save(path / "images" / f"{index}.png")
        tokens = ["7", "<|im_end|>"] if index < 2 else ["3", "then", "7", "=", "10", "<|im_end|>"]
        rows, columns = np.mgrid[:14, :14]
        looks = []
        for pair in range(2):
            weights = []
            for _ in tokens:
                y, x = random.uniform(2, 12, 2)
                w = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 6) + 0.01
                weights.append((w / w.sum()).ravel().tolist())
            look = {"pair": pair, "layer": 1 + 4 * pair, "tokens": tokens, "grid": [14, 14]}
            memory = ("vision", "overview")[pair]
            looks.append({**look, "memory": memory, "weights": weights})
        examples.append(
            {
                "key": key,
                "image": f"images/{index}.png",
                "question": f"Is 3 < 7 & <script>alert({index})</script>? Name the digit.",
                "prediction": "7",
                "truth": "7" if index % 2 else "9",
                "score": float(index % 2),
                "looks": looks,
                "looked": [[[0.5, 0.25, 0.5]], [[0.9, 0.9, 0.4]]] if index == 0 else None,
            }
        )
    load = random.dirichlet(np.full(16, 2.0), size=(len(SKILLS), 4)).tolist()
    experts = {"keys": list(SKILLS), "layers": [1, 4, 7, 9], "load": load}
    evaluation = {"examples": examples, "experts": experts}
    (path / "evaluation.json").write_text(json.dumps(evaluation))
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    return write_report(make_run(tmp_path_factory.mktemp("run"))).read_text(encoding="utf-8")


def test_page_is_self_contained(page):
    assert "http://" not in page and "https://" not in page
    for value in re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', page):
        assert value.startswith(("data:image/png;base64,", "#")), value[:80]
    for value in re.findall(r"url\(([^)]*)\)", page):
        assert value.startswith(("data:image/png;base64,", "#")), value[:80]


def test_page_has_every_skill_and_section(page):
    for name, skill in SKILLS.items():
        assert page.count(name.replace("&", "&amp;")) >= 4
        assert f"{100 * skill['accuracy']:.1f}%" in page
    for section in ("Accuracy by skill", "The model", "Training", "Where the model looks"):
        assert f"<h2>{section}</h2>" in page
    assert "<h2>Experts by skill</h2>" in page and "<h2>Sample scenes</h2>" in page


def test_every_layer_of_a_stage_is_named_once(page):
    from megatron_mm.config.layers.kinds import LAYERS

    stages = re.findall(r'class="stage">.*?</div>', page, re.DOTALL)
    letters = [re.findall(r"</?b[^>]*>([^<])</b>", stage) for stage in stages]
    assert letters == [list("GELVGE"), list("J*EQCE")]
    legend = page[page.index('class="kinds') :].split("</div>")[0]
    assert len(re.findall("<b ", legend)) == 8
    assert all(LAYERS[letter].title in legend for letter in "GELVJ*QC")


def test_a_look_names_its_memory_unless_it_is_the_usual_one(page):
    assert "look 0, layer 1" in page and "look 1 at overview, layer 5" in page


def test_windows_are_drawn_where_the_answer_looked(page):
    """In percent of the scene, cut at its edges, numbered as the looks of the answer."""
    drawn = re.findall(r'class="window"[^>]*?style="([^"]*)">(\d+)<', page, re.DOTALL)
    assert drawn == [
        ("left:0.0%;top:25.0%;width:50.0%;height:50.0%", "1"),
        ("left:70.0%;top:70.0%;width:30.0%;height:30.0%", "2"),
    ]


def test_questions_are_escaped(page):
    assert "<script" not in page
    assert "Is 3 &lt; 7 &amp; &lt;script&gt;alert(0)" in page
    assert "&lt;|im_end|&gt;" in page


def test_charts_follow_the_page_colors(page):
    assert "#0a0b0" not in page and "var(--accent)" in page


def test_results_alone_are_enough(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"skills": {"ocr": {"accuracy": 0.5}}}))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "ocr" in page and "<h2>Training" not in page and "<h2>Experts" not in page


def test_text_only_example_and_missing_image(tmp_path):
    text = {"key": "text", "question": "2+2?", "prediction": "4", "truth": "4", "score": 1}
    lost = {**text, "key": "ocr", "image": "gone.png", "score": 0.5, "looks": None}
    (tmp_path / "evaluation.json").write_text(json.dumps({"examples": [text, lost]}))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "2+2?" in page and "image not found: gone.png" in page and "partly right" in page
    assert "Where the model looks" not in page


def test_a_crop_is_drawn_and_a_bad_box_is_no_image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (10, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    example = {"key": "ocr", "question": "?", "prediction": "4", "truth": "4", "image": "a.png"}
    boxes = (None, [0.5, 0.2, 0.9, 1.0], [0.5, 0.2, 0.4, 1.0])
    examples = [example | {"key": f"ocr{n}", "box": box} for n, box in enumerate(boxes)]
    (tmp_path / "evaluation.json").write_text(json.dumps({"examples": examples}))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    drawn = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    shown = [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in drawn]
    for found, expected in zip(shown, (pixels, pixels[2:, 10:18]), strict=True):
        assert np.array_equal(found, expected)
    assert page.count("image not found: a.png") == 1


def test_metrics_alone_with_gaps(tmp_path):
    lines = ['{"iteration": 1, "train/lm_loss": 2.0}', '{"iteration": 2, "train/lm_loss": null}']
    lines += ['{"iteration": 3, "train/lm_loss": 1.0}', '{"iteration": 3, "accuracy/ocr": 0.25}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "language model loss" in page and "25.0%" in page


def test_every_loss_has_its_curve(tmp_path):
    """Preference pairs, a teacher and an objective of one's own have losses of their own."""
    records = [
        {"iteration": n, "train/kd_loss": 0.5, "train/dpo_loss": 0.75 / n, "rewards/margins": n - 2}
        for n in (1, 2, 3)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "dpo loss" in page and "kd loss" in page and "of the better answer over" in page
    for record in records:
        del record["train/kd_loss"]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "last training loss" in page and "0.25" in page and "first 0.75" in page


def test_accuracy_table():
    table = accuracy_table({"skills": {"ocr": SKILLS["ocr"], "count": {"accuracy": 1.0}}})
    assert table.splitlines() == [
        "skill  accuracy  chance    n",
        "----------------------------",
        "ocr       96.4%   10.0%  500",
        "count    100.0%       –    –",
    ]


def test_losses_of_held_out_answers_stand_beside_accuracies(tmp_path):
    skills = {"ocr": SKILLS["ocr"] | {"lm_loss": 0.12345}, "count": {"accuracy": 1.0}}
    assert accuracy_table({"skills": skills}).splitlines()[-2:] == [
        "ocr       96.4%   10.0%  500  0.123",
        "count    100.0%       –    –      –",
    ]
    run = make_run(tmp_path / "run", steps=20)
    assert "held-out answers" not in write_report(run).read_text(encoding="utf-8")
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(f'{{"iteration": {n}, "valid/lm_loss": {2 / n}}}\n' for n in (10, 20))
    results = json.loads((run / "results.json").read_text()) | {"skills": skills}
    (run / "results.json").write_text(json.dumps(results))
    page = write_report(run).read_text(encoding="utf-8")
    assert "language model loss on held-out answers" in page
    assert "<th>loss</th>" in page and "<td>0.123</td>" in page


def test_expert_lift():
    lift = expert_lift([[[0.75, 0.25, 0.0]], [[0.25, 0.75, 0.0]]])
    np.testing.assert_allclose(lift[0, 0], [np.log2(1.5), -1.0, 0.0])


def test_command_line(tmp_path, capsys):
    assert main([str(make_run(tmp_path / "run", steps=20))]) == 0
    assert capsys.readouterr().out.strip().endswith("report.html")
    assert main([str(tmp_path / "nothing")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1

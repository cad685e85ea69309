"""The table of metrics."""

from efficient_vlm.evaluation.metrics import captions, choice, place, text, vqa, yes_no
from efficient_vlm.evaluation.metrics.base import Metric, Row, mean

_OCR = "OCRBench, arXiv 2305.07895"
_VQA = "VQA, arXiv 1505.00468"
_POPE = "POPE, arXiv 2305.10355"


def _boxes(rows):
    """Also the share of answers whose box has 0.5 or more."""
    return {"share_with_iou_at_50": mean([row["more"]["iou_at_50"] for row in rows])}


def _points(rows):
    """Also mean precision and recall."""
    return {name: mean([row["more"][name] for row in rows]) for name in ("precision", "recall")}


def _ocrbench(rows: list[Row]) -> dict[str, float]:
    """Also the number of right answers, which OCRBench's total of 1000 counts."""
    return {"right_answers": sum(row["score"] for row in rows)}


METRICS: dict[str, Metric] = {
    "exact_match": Metric(
        "The answer is a reference, white space and case aside",
        "as this project's own benchmark",
        text.exact_match,
    ),
    "vqa_accuracy": Metric(
        "Agreement with ten people, the mean over leaving each out; answers in the official form",
        f"{_VQA}; lmms-eval (VQAv2)",
        vqa.vqa_accuracy,
    ),
    "vqa_accuracy_script": Metric(
        "The same, but answers stay as they are where all people agree",
        "script of visualqa.org and its copies",
        vqa.vqa_accuracy_script,
    ),
    "vqa_accuracy_plain": Metric(
        "min(1, people who agree / 3), nobody left out",
        "Molmo's code",
        vqa.vqa_accuracy_plain,
    ),
    "vqa_accuracy_textvqa_lmms_eval": Metric(
        "As vqa_accuracy, after commas and question marks went and 's became a word",
        "lmms-eval (TextVQA)",
        vqa.vqa_accuracy_textvqa_lmms_eval,
    ),
    "vqa_accuracy_vlmevalkit": Metric(
        'As vqa_accuracy, but a dot behind a digit stays: "3." is not "3"',
        "VLMEvalKit",
        vqa.vqa_accuracy_vlmevalkit,
    ),
    "vqa_accuracy_evalscope": Metric(
        'As vqa_accuracy, but all marks become spaces and contractions stay: "$5" is "5"',
        "evalscope",
        vqa.vqa_accuracy_evalscope,
    ),
    "anls": Metric(
        "Levenshtein similarity to the nearest reference, 0 unless above one half",
        "ST-VQA, arXiv 1907.00490, equation 1",
        text.anls,
    ),
    "anls_vlmevalkit": Metric(
        "As anls, but a similarity of exactly one half counts",
        "VLMEvalKit, evalscope",
        text.anls_vlmevalkit,
    ),
    "anls_lmms_eval": Metric(
        "As anls_vlmevalkit, over lengths that include white space at the ends",
        "lmms-eval",
        text.anls_lmms_eval,
    ),
    "relaxed_accuracy": Metric(
        "A number within 5 % of the reference, else the same text",
        "ChartQA, arXiv 2203.10244; lmms-eval, VLMEvalKit",
        text.relaxed_accuracy,
    ),
    "relaxed_accuracy_evalscope": Metric(
        'As relaxed_accuracy, but "0.0" is right where the reference is 0',
        "evalscope",
        text.relaxed_accuracy_evalscope,
    ),
    "multiple_choice": Metric(
        "The answer names the right option, by its letter or in its words",
        "this project",
        choice.multiple_choice,
    ),
    "mmmu": Metric(
        "MMMU's reading of letters and open answers; one that names nothing is wrong",
        "MMMU, arXiv 2311.16502",
        choice.mmmu,
        summarise=choice.by_subject,
    ),
    "mmmu_lmms_eval": Metric(
        "As mmmu, but for an answer that names nothing a letter is drawn, by seed and question",
        "MMMU's script, lmms-eval",
        choice.mmmu_lmms_eval,
        summarise=choice.by_subject,
    ),
    "yes_no": Metric(
        'No if the first sentence denies, else yes; F1 of "yes" and share of yes',
        f"{_POPE}, its own script",
        yes_no.yes_no,
        summarise=yes_no.pope,
    ),
    "yes_no_lmms_eval": Metric(
        'The whole answer is "yes" or "no", else neither; yes share of the references',
        "lmms-eval (POPE)",
        yes_no.yes_no_lmms_eval,
        summarise=yes_no.pope_lmms_eval,
    ),
    "yes_no_vlmevalkit": Metric(
        "The answer has one of the words yes and no, else neither",
        "VLMEvalKit (POPE)",
        yes_no.yes_no_vlmevalkit,
        summarise=yes_no.pope,
    ),
    "yes_no_evalscope": Metric(
        "The answer has one of the words Yes and No, capitalised, else neither",
        "evalscope (POPE)",
        yes_no.yes_no_evalscope,
        summarise=yes_no.pope,
    ),
    "mme": Metric(
        "Yes or no by the first letters; accuracy and accuracy+ by image and subtask, sums",
        "MME, arXiv 2306.13394; lmms-eval",
        yes_no.mme,
        needs=("references", "category"),
        summarise=yes_no.mme_total,
    ),
    "ocrbench": Metric(
        "The answer contains a reference; formulas (category HME100k) with case, without spaces",
        f"{_OCR}; evalscope",
        text.ocrbench,
        summarise=_ocrbench,
    ),
    "ocrbench_lmms_eval": Metric(
        "As ocrbench, full-width letters as plain ones",
        "lmms-eval",
        text.ocrbench_lmms_eval,
        summarise=_ocrbench,
    ),
    "points": Metric(
        "F1 of points matched to masks of objects, or to their points within a distance",
        "Molmo, arXiv 2409.17146",
        place.points,
        needs=("references or masks",),
        summarise=_points,
    ),
    "points_lmms_eval": Metric(
        "The share of points inside the mask",
        "lmms-eval (PointBench)",
        place.points_lmms_eval,
        needs=("masks",),
    ),
    "boxes": Metric(
        "Intersection over union with the reference box; share at one half or more",
        "RefCOCO, as lmms-eval",
        place.boxes,
        summarise=_boxes,
    ),
    "count": Metric(
        "The first whole number is that of the reference; number words and points count",
        "this project",
        place.count,
    ),
    "count_lmms_eval": Metric(
        "The first digits are those of the reference, as texts",
        "lmms-eval (PixMo-Count)",
        place.count_lmms_eval,
    ),
    "bleu": Metric(
        "BLEU-4 of each caption and of all together, by sacrebleu",
        "arXiv 1804.08771",
        captions.bleu,
        summarise=captions.corpus_bleu,
    ),
    "cider": Metric(
        "CIDEr-D over 10, with weights from the references of all captions",
        "arXiv 1411.5726",
        captions.cider,
        summarise=captions.cider_total,
        corpus=captions.cider_scores,
    ),
}

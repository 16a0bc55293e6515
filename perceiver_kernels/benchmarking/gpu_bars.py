"""The bars of a GPU, computed from the records of its stages: nothing is measured here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from perceiver_kernels.benchmarking import tables
from perceiver_kernels.benchmarking.bars import Bar

Record = dict[str, Any]

EXPERTS = ("expert-flash", "expert-efficient", "expert-cudnn", "expert-compiled", "expert-flex")


def measured(stages: dict[str, Any], batch: int, dtype: str) -> list[Bar]:
    """Every bar, in the order of the table; what a stage did not measure has no value.

    Args:
        stages: of the report.
        batch, dtype: of the comparisons that the bars look at.
    """
    records = {name: stages.get(name, {}).get("records", []) for name in ("roofline", "operators", "encoder", "models")}
    return [
        *kernel(records["operators"], records["encoder"], records["roofline"], batch, dtype),
        *layer(records["encoder"], batch, dtype),
        *released_model(records["models"], batch, dtype),
        *attention(records["operators"]),
    ]


def kernel(
    operators: Sequence[Record], encoder: Sequence[Record], roofline: Sequence[Record], batch: int, dtype: str
) -> Iterator[Bar]:
    """Pairs per second of separable attention alone."""
    rates: dict[str, float] = roofline[0]["rates"] if roofline else {}
    record = found(operators, op="separable_attention", batch=batch, dtype=dtype)
    speed = record.get("results", {}).get("forward", {}).get("ours", {}).get("per_second")
    parts = []
    if speed and rates.get("exponentials"):
        parts.append(f"{speed / rates['exponentials']:.0%} of the bare exponential's rate")
    whole = found(encoder, case="imagenet", batch=batch, dtype=dtype, mode="forward")
    ours = by_provider(whole).get("ours", {})
    if ours.get("timing"):
        parts.append(f"{tables.rate(whole['pairs'] / ours['timing']['median'])} in the layer")
    what = f"separable attention, forward, batch {batch}, {dtype}: pairs/s"
    yield Bar(what, speed, 1.4e12, at_least=True, show=tables.rate, note=", ".join(parts) or reason(record))


def layer(encoder: Sequence[Record], batch: int, dtype: str) -> Iterator[Bar]:
    """The encoder cross-attention against the best of the experts, and against transformers."""
    forward = found(encoder, case="imagenet", batch=batch, dtype=dtype, mode="forward")
    both = found(encoder, case="imagenet", batch=batch, dtype=dtype, mode="forward+backward")
    wide = found(encoder, case="imagenet-official", batch=batch, dtype=dtype, mode="forward")
    title = f"batch {batch}, {dtype}"
    yield fastest(f"layer, head of 64, forward, {title}: expert / ours", forward, EXPERTS, 2.2)
    yield backward(f"layer, head of 64, backward, {title}: expert / ours", forward, both)
    yield fastest(f"layer, one head of 261, forward, {title}: transformers / ours", wide, ("transformers",), 8.0)


def backward(what: str, forward: Record, both: Record) -> Bar:
    """Of each provider, the time of both directions without that of forward; the fastest expert's over ours."""
    medians = {
        name: result["timing"]["median"] - by_provider(forward)[name]["timing"]["median"]
        for name, result in by_provider(both).items()
        if result.get("timing") and by_provider(forward).get(name, {}).get("timing")
    }
    ours = medians.get("ours")
    ratios = [(medians[name] / ours, name) for name in EXPERTS if ours and name in medians]
    value, note = min(ratios, default=(None, reason(both)))
    return Bar(what, value, 2.0, at_least=True, note=f"the fastest is {note}" if value else note)


def released_model(models: Sequence[Record], batch: int, dtype: str) -> Iterator[Bar]:
    """The whole released model against transformers under torch.compile, or plain PyTorch where there is none."""
    for mode, limit in (("forward", 1.5), ("train-step", 1.4)):
        record = found(models, case="imagenet-released", batch=batch, mode=f"{mode}-{dtype}")
        compiled = by_provider(record).get("transformers-compiled", {}).get("timing")
        peers = ("transformers-compiled",) if compiled else ("plain-compiled", "plain")
        what = f"released ImageNet model, {mode}, batch {batch}, {dtype}: compiled / ours"
        yield fastest(what, record, peers, limit, always_named=True)


def attention(operators: Sequence[Record]) -> Iterator[Bar]:
    """latent_attention against the best of SDPA's backends, at the shape where it does worst."""
    records = [record for record in operators if record.get("op") == "latent_attention" and "results" in record]
    for direction in ("forward", "backward"):
        ratios = []
        for record in records:
            entries = record["results"].get(direction, {})
            known = [(entry["times_ours"], name) for name, entry in entries.items() if entry.get("times_ours")]
            peers = [(ratio, name) for ratio, name in known if name.startswith("SDPA")]
            if peers:
                ratio, name = min(peers)
                ratios.append(
                    (ratio, f"batch {record['batch']}, head_dim {record['head_dim']}, {record['dtype']}: {name}")
                )
        value, note = min(ratios, default=(None, "not measured"))
        what = f"latent_attention, {direction}, {len(ratios)} shapes: the best SDPA / ours"
        yield Bar(what, value, 1.0, at_least=True, note=note)


def fastest(what: str, record: Record, peers: Sequence[str], limit: float, always_named: bool = False) -> Bar:
    """How many times as long as ours the fastest of the peers takes."""
    results = by_provider(record)
    ratios = [(results[name]["times_ours"], name) for name in peers if results.get(name, {}).get("times_ours")]
    if not ratios:
        refused = [f"{name} {results[name]['refused']}" for name in peers if results.get(name, {}).get("refused")]
        return Bar(what, None, limit, at_least=True, note="; ".join(refused) or reason(record))
    value, name = min(ratios)
    named = always_named or len(peers) > 1
    return Bar(what, value, limit, at_least=True, note=f"the fastest is {name}" if named else "")


def found(records: Sequence[Record], **keys: Any) -> Record:
    """The record with these values, or an empty one."""
    return next((record for record in records if all(record.get(key) == keys[key] for key in keys)), {})


def by_provider(record: Record) -> dict[str, Record]:
    return {result["provider"]: result for result in record.get("results", [])}


def reason(record: Record) -> str:
    return record.get("left out") or "not measured"

"""What the figures of a comparison say, in sentences."""

from __future__ import annotations

from kvjax import costs
from kvjax.strategies.kept import (
    ABSORBED,
    BOTH_KV,
    KV,
    NONE,
    OUTPUT,
    SOURCE_ABSORBED,
    SOURCE_AGAIN,
    SUB_LAYERS,
)
from kvjax.strategies.runs import Comparison, Row


def sentences(made: Comparison) -> list[str]:
    """What the figures say of keeping other things than keys and values."""
    rows = {row.name: row for row in made.rows if row.refused is None}
    if {NONE, KV, OUTPUT} <= set(rows):
        return _of_text(made, rows)
    if {NONE, BOTH_KV, SOURCE_AGAIN, SUB_LAYERS} <= set(rows):
        return _of_source(made, rows)
    return []


def _of_text(made: Comparison, rows: dict[str, Row]) -> list[str]:
    config, kv, output = made.config, rows[KV], rows[OUTPUT]
    ratio = costs.layer_input_ratio(config)
    again = 4 * config.width * config.kv_heads * config.head_dim
    work = output.counted.contractions / kv.counted.contractions
    share = 1 / costs.patch_sweep_share(config.num_layers, made.capacity)
    compared = "the larger" if ratio > 1 else "the smaller" if ratio < 1 else "as large"
    said = [
        f"Bytes: a layer's input is {ratio:.2f} of its keys and values (width over 2 · kv heads · head width), "
        f"{compared} of the two; the whole output cache has {output.nbytes / kv.nbytes:.2f} of the bytes of K/V.",
        f"Output caches lose in decoding: one saves no FLOP over K/V, and making keys and values again adds {again:,} "
        f"(4 · width · kv heads · head width) for each cached position, layer and step. A step did {work:.1f} times "
        f"the work of K/V and took {_times(output, kv)} times as long.",
        f"Output caches win in resuming: a run goes on from any layer and position, which K/V alone does not allow. "
        f"The last {made.edited} positions again from the middle layer took {_milliseconds(output, 'resume')}; the "
        f"whole text anew took {_milliseconds(rows[NONE], 'edit')}. Where keys and values are kept as well, patching "
        f"each (layer, position) of {made.capacity} tokens is {share:.1f} times less linear work than whole runs.",
    ]
    if ABSORBED in rows:
        said.append(
            f"Absorbed, nothing is made again and scores are {config.width / config.head_dim:.0f} times the work "
            f"(width over head width): {_times(rows[ABSORBED], kv)} times as long as K/V."
        )
    return said


def _of_source(made: Comparison, rows: dict[str, Row]) -> list[str]:
    config, kv, sub_layers, again = made.config, rows[BOTH_KV], rows[SUB_LAYERS], rows[SOURCE_AGAIN]
    assert config.encoder is not None and made.source is not None
    slots, sources = made.source.slots, made.source.rows
    ratio = costs.cross_ratio(config)
    once = costs.projecting_flops(config, source=slots, rows=sources).contractions
    encoder = costs.encoder_flops(config, source=slots, rows=sources).contractions
    said = [
        f"Bytes: a source's keys and values are {ratio:.2f} times the encoder's output (2 · layers · kv heads · head "
        f"width over its width). Rows that share a source add nothing to either, and no step changes them.",
        f"Projecting the sources costs {once:,.0f} FLOP, once or with every call: then a step does "
        f"{_work(again, kv)} times the work of K/V. It took {_times(again, kv, 'step')} times as long as a call of its "
        f"own, {_times(again, kv)} times in one loop, out of which a compiler may take what does not change.",
    ]
    if SOURCE_ABSORBED in rows:
        said.append(
            f"Absorbed, nothing is projected and cross-attention's scores are "
            f"{config.encoder.width / config.head_dim:.0f} times the work (the encoder's width over head width): "
            f"{_times(rows[SOURCE_ABSORBED], kv, 'step')} times as long as K/V, {_times(rows[SOURCE_ABSORBED], kv)} in "
            f"one loop."
        )
    said += [
        f"Without any cache a step runs the text again. Running the encoder again with it as well, as the plainest "
        f"code does, would be {encoder:,.0f} FLOP more: {encoder / kv.counted.contractions:.1f} steps with K/V.",
        f"Outputs of all sub-layers have {sub_layers.nbytes / kv.nbytes:.2f} of the bytes of K/V and lose in decoding: "
        f"{_times(sub_layers, kv)} times as long. They are for resuming: the last {made.edited} positions again from "
        f"the middle layer took {_milliseconds(sub_layers, 'resume')}; the whole text anew took "
        f"{_milliseconds(rows[NONE], 'edit')}.",
    ]
    return said


def _milliseconds(row: Row, operation: str) -> str:
    return f"{1e3 * (row.median(operation) or 0):.1f} ms"


def _times(row: Row, than: Row, operation: str = "token") -> str:
    return f"{(row.median(operation) or 0) / (than.median(operation) or 1):.1f}"


def _work(row: Row, than: Row) -> str:
    return f"{row.counted.contractions / than.counted.contractions:.1f}"


__all__ = ["sentences"]

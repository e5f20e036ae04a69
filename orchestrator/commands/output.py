"""Prints the results of commands on stdout: as a table for people, as JSON or as YAML."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from orchestrator.results.savings import Savings

if TYPE_CHECKING:
    from rich.console import RenderableType


def emit(data: Any, output_format: str, table: Callable[[], RenderableType]) -> None:
    """Print `data` as JSON or YAML, or else the table that `table` returns, on stdout."""
    if output_format == "json":
        click.echo(_json(data))
    elif output_format == "yaml":
        _yaml(data)
    else:
        from rich.console import Console

        Console().print(table())


def _json(data: Any) -> str:
    text = json.dumps(data, indent=2, ensure_ascii=False)
    try:
        # Not every text can be encoded: Python reads bytes of a file name that are not UTF-8 as
        # lone surrogates (PEP 383), and stdout may have another encoding than UTF-8. Then all
        # characters that are not ASCII are written as JSON's escapes (\uXXXX).
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(data, indent=2)
    return text


def savings_as_data(row: Savings) -> dict[str, Any]:
    """Return a row as plain data.

    The bytes of its footprint and of the control are rounded to whole numbers. `returned.share` is
    the share of the freed bytes that came back to the host.
    """
    data = asdict(row)
    footprint = data["footprint"]
    if row.control_bytes is not None:
        data["control_bytes"] = round(row.control_bytes)
    if row.footprint is not None:
        for name in ("peak_resident_bytes", "mean_resident_bytes"):
            footprint[name] = round(footprint[name])
        returned = row.footprint.returned
        if returned is not None:
            footprint["returned"]["left_bytes"] = round(returned.left_bytes)
            footprint["returned"]["share"] = returned.share
    return data


def _yaml(data: Any) -> None:
    from ruamel.yaml import YAML

    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    # By default, ruamel.yaml sorts the keys of a dict. Keep the order of ours.
    writer.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    writer.dump(data, sys.stdout)

"""What a section of a report shows: its blocks of a kind, the rows of a table, the labels of its plots."""

from trl_opd.report.blocks import Plot, Section, Table


def of_kind(section: Section, kind: type) -> list:
    return [block for block in section.blocks if isinstance(block, kind)]


def table(section: Section, place: int = 0) -> list[dict]:
    found = of_kind(section, Table)[place]
    return [dict(zip(found.columns, row, strict=True)) for row in found.rows]


def labels(section: Section) -> str:
    return "\n".join(plot.label for plot in of_kind(section, Plot))

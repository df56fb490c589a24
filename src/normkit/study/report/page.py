"""Pages from templates: one jinja2 environment, and the filters that all templates share."""

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from normkit.study.report.format import enumerate_words, format_p, format_points, pluralize


def render_template(template: str, **values: Any) -> str:
    """Fill a template; in HTML every text is escaped, and a name without a value is an error.

    Args:
        template: File name in ``templates/``.
        **values: The names that it uses.
    """
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("normkit.study.report", "templates"),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "pluralize": pluralize,
        "capitalized": lambda text: text[:1].upper() + text[1:],
        "enumerate": enumerate_words,
        "points": format_points,
        "p_value": format_p,
        "prose": prose,
        "code": markdown_code,
        "number": "{:,}".format,
    }
    return environment


def prose(text: str) -> Markup:
    """A sentence with names in backticks as HTML.

    >>> str(prose("`a<b` won"))
    '<code>a&lt;b</code> won'
    """
    pieces = enumerate(text.replace(" %", "\N{NO-BREAK SPACE}%").split("`"))
    return Markup("").join(Markup("<code>{}</code>").format(piece) if k % 2 else escape(piece) for k, piece in pieces)


def markdown_code(text: object) -> str:
    r"""Any text as one Markdown code span that fits a table cell.

    >>> print(markdown_code("a|b"))
    `a\|b`
    """
    line = " ".join(str(text).split()).replace("`", "'").replace("|", "\\|")
    return f"`{line}`" if line else ""

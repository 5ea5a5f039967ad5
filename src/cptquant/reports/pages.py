"""The templates of the HTML pages."""

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Template


@cache
def load_template(name: str) -> "Template":
    """A page of `templates/`; values are escaped, and a name that is missing is an error."""
    # imported here: jinja2 costs more than the whole of core, and `cptquant --help` needs none of it
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("cptquant.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)

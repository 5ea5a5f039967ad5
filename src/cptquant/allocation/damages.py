"""Reading the sensitivity table: which damage a site has in a format, and what to say if there is none."""

import math

from cptquant.core.errors import ArtifactError
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout, Site
from cptquant.core.sensitivity import SensitivityTable


def find_damage(table: SensitivityTable | None, site: Site, fmt: QuantFormat) -> float:
    """Damage of a format at a site; 16 bits is 0 unless the table says otherwise, and so is all without a table.

    Raises:
        ArtifactError: the table has no such site or format, or a damage that is not finite.
    """
    if table is None:
        return 0.0
    row = table.damages.get(site.name)
    if row is None:
        raise ArtifactError(
            f"sensitivity.json has no row for {site.name}, a site of layout.json: the two files are not of one model; "
            f"make it anew with: {table.MADE_BY}"
        )
    damage = row.get(fmt.name)
    if damage is None:
        if fmt.is_float:
            return 0.0
        raise ArtifactError(
            f"sensitivity.json has no damage of {fmt.name} at {site.name}, it has {', '.join(row) or 'none'}; "
            f"choose --formats among those, or measure with the same --formats: {table.MADE_BY}"
        )
    if not math.isfinite(damage.value):
        raise ArtifactError(
            f"sensitivity.json: the damage of {fmt.name} at {site.name} is {damage.value}, expected a finite number; "
            f"make it anew with: {table.MADE_BY}"
        )
    return damage.value


def check_sites(table: SensitivityTable, layout: ModelLayout) -> None:
    """Refuse the table of another model before its rows are mixed with this one's sites.

    Raises:
        ArtifactError: the table names a site that the layout does not have.
    """
    unknown = [name for name in table.damages if name not in layout.site_by_name]
    if unknown:
        raise ArtifactError(
            f"sensitivity.json has {len(unknown)} sites that layout.json does not have (first: {unknown[0]}): the two "
            f"files are not of one model; make it anew with: {table.MADE_BY}"
        )


def sum_damages(table: SensitivityTable, layout: ModelLayout, formats: dict[str, QuantFormat]) -> float:
    """Predicted damage of a plan, in the table's unit.

    Raises:
        ArtifactError: as `find_damage`.
    """
    return math.fsum(find_damage(table, layout.site_by_name[name], fmt) for name, fmt in formats.items())

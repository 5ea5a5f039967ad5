"""Exchange formats of one or two sites at a time as long as a quadratic estimate of the whole plan falls.

With x the 0/1 choice and G from `Sketches.interactions`, the estimate is 1/2 x'Gx; the knapsack minimises its diagonal
part exactly, this its whole locally: the best of all exchanges of one or two sites within the bytes, until none helps.
"""

from collections.abc import Mapping

import numpy as np

from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout
from cptquant.core.sensitivity import SensitivityTable
from cptquant.core.targets import Target
from cptquant.sensitivity.sketch import Sketches


def improve_choice(
    site_of: np.ndarray,  # (options,) int: which site an option belongs to
    size_bytes: np.ndarray,  # (options,) int
    quadratic: np.ndarray,  # (options, options) float, symmetric
    choice: np.ndarray,  # (sites,) int: the option of each site
    limit_bytes: int,
) -> tuple[np.ndarray, float]:
    """The improved choice and its estimate 1/2 x'Gx. Exchanges are taken greedily, the best first."""
    choice = choice.copy()
    alone = np.diag(quadratic) / 2
    while True:
        taken = choice[site_of]  # per option: what its site has now
        used = int(size_bytes[choice].sum())
        field = quadratic[:, choice].sum(axis=1)
        field -= quadratic[np.arange(len(site_of)), taken]  # of all other sites
        single = alone - alone[taken] + field - field[taken]
        cross = quadratic - quadratic[:, taken] - quadratic[taken] + quadratic[np.ix_(taken, taken)]
        change = single[:, None] + single[None, :] + cross
        bytes_more = (size_bytes - size_bytes[taken])[:, None] + (size_bytes - size_bytes[taken])[None, :]
        change[site_of[:, None] == site_of[None, :]] = np.inf
        change[used + bytes_more > limit_bytes] = np.inf
        single = np.where(used + size_bytes - size_bytes[taken] <= limit_bytes, single, np.inf)
        first, second = np.unravel_index(int(change.argmin()), change.shape)
        best_alone = int(single.argmin())
        if min(float(change[first, second]), float(single[best_alone])) >= -1e-12:
            x = np.zeros(len(site_of))
            x[choice] = 1
            return choice, float(x @ quadratic @ x) / 2
        for option in (first, second) if change[first, second] < single[best_alone] else (best_alone,):
            choice[site_of[option]] = option


def improve_plan(
    layout: ModelLayout,
    target: Target,
    formats: Mapping[str, str],
    table: SensitivityTable,
    sketches: Sketches,
    limit_bytes: int,
    *,
    shrunk: bool,
) -> tuple[dict[str, str], float]:
    """A plan for the sites of the blocks, from `formats`; scores of single options from the table.

    Returns:
        Site name -> format name for every site, and the estimate of the plan's divergence.
    """
    sites = [site.name for site in layout.block_sites]
    options = [(name, fmt) for name in sites for fmt in table.damages[name]]
    place = {option: index for index, option in enumerate(options)}
    site_of = np.array([sites.index(name) for name, _ in options])
    quadratic = np.zeros((len(options), len(options)))
    known = [index for index, option in enumerate(options) if option in sketches.place]
    rows = [sketches.place[options[index]] for index in known]
    quadratic[np.ix_(known, known)] = sketches.interactions(shrunk=shrunk).numpy()[np.ix_(rows, rows)]
    np.fill_diagonal(quadratic, [2 * table.damages[name][fmt].value for name, fmt in options])
    sizes = np.array(
        [target.site_bytes(layout, layout.site_by_name[name], QuantFormat.parse(fmt)) for name, fmt in options]
    )
    start = np.array([place[name, formats[name]] for name in sites])
    choice, estimate = improve_choice(site_of, sizes, quadratic, start, limit_bytes)
    return {**formats, **{name: options[index][1] for name, index in zip(sites, choice, strict=True)}}, estimate

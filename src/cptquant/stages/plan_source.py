"""A plan as a person names it, a run folder or a plan.json, with what stands beside it. Loads no framework."""

from dataclasses import dataclass
from pathlib import Path

from cptquant.core.errors import ArtifactError
from cptquant.core.formats import QuantFormat
from cptquant.core.layout import ModelLayout
from cptquant.core.manifest import Manifest
from cptquant.core.plan import Plan
from cptquant.core.sensitivity import SensitivityTable
from cptquant.core.settings import RunSettings
from cptquant.stages.allocate import check_plan
from cptquant.stages.own_text_choice import carry_own_text


@dataclass(frozen=True)
class PlanSource:
    """A plan and the run folder it belongs to.

    Attributes:
        path: of the plan. folder: the run folder: the plan's own, or the one above it (plans of a frontier).
    """

    path: Path
    folder: Path
    plan: Plan

    @property
    def label(self) -> str:
        """The file, as given."""
        return str(self.path)

    def layout(self) -> ModelLayout:
        """The model the plan is for, checked against it.

        Raises:
            ArtifactError: missing, or the plan is illegal, of another model, or of another size than it says.
        """
        layout = ModelLayout.load(self.folder / "layout.json")
        check_plan(self.plan, layout)
        return layout

    def table(self) -> SensitivityTable:
        """The table the plan was made from; sensitivity.json where that one is gone, as `stale` then says.

        Raises:
            ArtifactError: there is none.
        """
        wanted = self.plan.inputs.get("table")
        for path in (self.folder / "sensitivity.json", *sorted(self.folder.glob("sensitivity-*.json"))):
            if path.exists() and (found := SensitivityTable.load(path)).digest() == wanted:
                return found
        path = self.folder / "sensitivity.json"
        if not path.exists():
            raise ArtifactError(
                f"{self.folder} holds no sensitivity.json, so nothing says what a format costs at a site; make "
                f"it with: cptquant measure {self.folder} --sensitivity METHOD"
            )
        return SensitivityTable.load(path)

    def stale(self, table: SensitivityTable, subject: str = "the plan") -> tuple[str, ...]:
        """One sentence where the table is not the one the plan was made from.

        Args:
            subject: of the sentence, where there are several plans.
        """
        wanted = self.plan.inputs.get("table")
        if wanted == table.digest():
            return ()
        if not wanted:
            return (f"{subject} was made without a table; it is judged by the one at hand, {table.method}",)
        return (f"{subject} was made from another table than the one at hand, {table.method}",)

    def formats(self, table: SensitivityTable) -> tuple[QuantFormat, ...]:
        """The candidates the plan was made from, beside 16 bits; the table's where the plan does not say."""
        asked = [name for name in self.plan.inputs.get("formats", "").split(",") if name] or table.format_names
        return tuple(fmt for fmt in map(QuantFormat.parse, asked) if not fmt.is_float)

    @property
    def quantizer(self) -> str:
        """What the plan was carried out with, or would be: the default beside a plan copied out of its run folder."""
        manifest = self.path.with_name(self.path.name.replace("plan", "manifest", 1))
        if manifest != self.path and manifest.exists():
            return Manifest.load(manifest).quantizer
        path = self.folder / "settings.json"
        settings = RunSettings.load(path) if path.exists() else RunSettings(model="")
        settings = carry_own_text(self.folder, settings)
        return settings.carried_out_with(ModelLayout.load(self.folder / "layout.json"))


def find_plan(path: Path) -> PlanSource:
    """The plan of a run folder, or a plan file in one.

    Raises:
        ArtifactError: no such file or folder, a folder without a plan, or a file that is no plan.
    """
    if path.is_dir():
        if not (path / "plan.json").exists():
            raise ArtifactError(
                f"{path} holds no plan.json; make it with: {Plan.MADE_BY.replace('RUN', str(path))}, or name a plan "
                "file, e.g. one of its frontier/"
            )
        return PlanSource(path / "plan.json", path, Plan.load(path / "plan.json"))
    if not path.exists():
        raise ArtifactError(f"{path} does not exist; give a run folder or a plan.json")
    plan = Plan.load(path)
    folder = path.parent if (path.parent / "layout.json").exists() else path.parent.parent
    return PlanSource(path, folder if (folder / "layout.json").exists() else path.parent, plan)

"""A contract of our own for import-linter (``make check``): methods of a family do not import each other."""

from importlinter import Contract, ContractCheck, fields, output


class SiblingsContract(Contract):
    """Two files of ``dfq.<family>`` never import each other, except a shared piece with a leading underscore."""

    type_name = "siblings"

    families = fields.SetField(subfield=fields.StringField())

    def check(self, graph, verbose):
        broken = []
        for family in sorted(self.families):
            children = graph.find_children(f"dfq.{family}")
            for importer in sorted(children):
                within = {importer} | graph.find_descendants(importer)
                for imported in sorted(children - {importer}):
                    if imported.rpartition(".")[2].startswith("_"):
                        continue
                    targets = {imported} | graph.find_descendants(imported)
                    broken += [
                        (source, target)
                        for source in sorted(within)
                        for target in sorted(graph.find_modules_directly_imported_by(source) & targets)
                    ]
        return ContractCheck(kept=not broken, metadata={"broken": broken})

    def render_broken_contract(self, check):
        for importer, imported in check.metadata["broken"]:
            output.print_error(
                f"{importer} imports {imported}: move what both need to a file with a leading underscore"
            )

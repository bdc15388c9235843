"""What the store can free, and whether it is whole.

Kept is what any study, winner, figure or measurement was made from, a study's generations, all that
a running build has looked for, and whatever is young.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from artifacts.errors import MissingArtifact, StoreError
from artifacts.figure_schemas import FIGURES
from artifacts.schemas import PEERS
from artifacts.store import MANIFEST, Manifest, Store

ROOTS = (
    *("studies", "winners", "tests", "leaderboards", "figures", "labels", "drift"),
    *("comparisons", "pictures", *FIGURES, *PEERS),
    "judgements",  # may have cost money, or a person's time
)
OF_A_STUDY = ("generations", "finals", "selections")  # belong to a study that made their protocol
REMARKS = (  # made from what studies use, and used by none
    *("near_duplicates", "categories", "sequence_kl", "capabilities"),
)
READERS = 8

Node = tuple[str, str]  # kind and key


@dataclass(frozen=True)
class Doomed:
    """A folder that can go, and why."""

    path: str
    why: str
    bytes: int


def unreachable(store: Store) -> list[Doomed]:
    """Folders that nothing needs. Reads manifests and sizes, no data; changes nothing.

    Raises:
        StoreError: the store cannot be read, or a damaged manifest does not tell what it needs.
    """
    manifests = {(m.kind, m.key): m for m in store.manifests()}
    kept, sizes = reachable(manifests, _in_use(store)), store.place.sizes("")
    young = max(store.place.young, store.place.longest_build())

    def doomed(path: str, why: str) -> Doomed:
        return Doomed(path, why, sum(n for file, n in sizes.items() if file.startswith(f"{path}/")))

    found = [doomed(path, "leftover") for path in store.place.abandoned()]
    for node in store.entries():
        path = "/".join(node)
        if node not in manifests and f"{path}/{MANIFEST}" in sizes:
            if _came_meanwhile(store, node):
                continue
            _refuse_unknown(node, kept)
        if node not in kept and store.place.age(path) > young:
            whole = node in manifests and _is_whole(manifests[node], sizes)
            found.append(doomed(path, f"orphan {node[0]}" if whole else "corrupt"))
    return found


def _came_meanwhile(store: Store, node: Node) -> bool:
    """Whether an artifact was finished after the manifests were read: it is new, not damaged."""
    try:
        store.manifest(*node)
    except StoreError:
        return False
    return True


def _refuse_unknown(torn: Node, kept: set[Node]) -> None:
    """Nobody knows what a torn manifest needs; that matters if something needs the artifact."""
    if torn in kept or torn[0] in (*ROOTS, *OF_A_STUDY):
        raise StoreError(
            f"the manifest of '{'/'.join(torn)}' is damaged, so nobody knows what it needs; "
            "run its config again, or: tribunal store verify --set-aside"
        )


def collect(store: Store, doomed: list[Doomed]) -> Iterator[Doomed]:
    """Delete what `unreachable` listed, unless something has come to need it since."""
    with store.collecting():
        still = {place.path for place in unreachable(store)}
        for place in doomed:
            if place.path in still:
                store.delete(place.path)
                yield place


def reachable(manifests: Mapping[Node, Manifest], used: set[Node]) -> set[Node]:
    """Everything that a root or a running build was made from, and what belongs to a study.

    With it goes what is said of it: overlaps between prompt sets that are all kept, say.
    """
    found: set[Node] = set()
    todo = [node for node in manifests if node[0] in ROOTS] + list(used)
    named = {m.inputs["protocol"]["key"] for m in manifests.values() if m.kind == "studies"}
    todo += [
        node
        for node, m in manifests.items()
        if m.kind in OF_A_STUDY and m.inputs["protocol"]["key"] in named
    ]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += _inputs(manifests[node]) if node in manifests else []
    remarks = (node for node in manifests if node[0] in REMARKS)
    return found | {node for node in remarks if found.issuperset(_inputs(manifests[node]))}


def check_all(
    store: Store, on_progress: Callable[[int, int], None]
) -> tuple[int, dict[Node, StoreError]]:
    """Read every artifact, several at once; how many there are, and what is wrong with which.

    What is a plain StoreError could not be read, which may pass; the artifact may be whole.
    """
    nodes, bad = list(store.entries()), {}

    def check(node: Node) -> StoreError | None:
        try:
            store.check(*node)
        except MissingArtifact as error:
            return None if store.place.remote else error  # in a bucket, it is being written
        except StoreError as error:
            return error
        return None

    with ThreadPoolExecutor(READERS) as pool:
        for done, (node, fault) in enumerate(zip(nodes, pool.map(check, nodes), strict=True), 1):
            if fault:
                bad[node] = fault
            on_progress(done, len(nodes))
    return len(nodes), bad


def _inputs(manifest: Manifest) -> list[Node]:
    return [(entry["kind"], entry["key"]) for entry in manifest.inputs.values()]


def _is_whole(manifest: Manifest, sizes: Mapping[str, int]) -> bool:
    path = f"{manifest.kind}/{manifest.key}"
    return sizes.get(f"{path}/{manifest.data}") == manifest.bytes and f"{path}/{MANIFEST}" in sizes


def _in_use(store: Store) -> set[Node]:
    """What running builds have looked for."""
    nodes = (line.split("/") for line in store.place.registered())
    return {(kind, key) for kind, key in nodes}

import check_duplicates
from check_duplicates import check


def write(root, package, name, lines):
    file = root / "packages" / package / "src" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")


def test_a_shared_run_is_found_once(tmp_path):
    shared = [f"value_{number} = {number}" for number in range(12)]
    write(tmp_path, "one", "a.py", ["import os", "first = 1", *shared, "last = 2"])
    write(
        tmp_path, "two", "b.py", ["# a comment", "", *shared[:5], "", "# why", *("    " + line for line in shared[5:])]
    )
    write(tmp_path, "one", "c.py", shared)  # twice in one package, which may be
    faults = check(tmp_path)
    assert faults == ["packages/one/src/a.py:3 and packages/two/src/b.py:3 share 10 lines or more"] + [
        line for line in faults[1:] if "c.py" in line
    ]
    assert len(faults) <= 2


def test_shorter_runs_imports_and_comments_do_not_count(tmp_path):
    shared = [f"value_{number} = {number}" for number in range(9)]
    imports = [f"from library import name_{number}" for number in range(12)]
    for package in ("one", "two"):
        write(tmp_path, package, "a.py", [*imports, *shared, "# comment", f"own = {package!r}"])
    assert check(tmp_path) == []


def test_this_repository():
    assert check(check_duplicates.ROOT) == []

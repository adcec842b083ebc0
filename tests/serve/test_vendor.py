"""The page's vendored libraries are the released files that the table in vendor/README.md lists."""

import hashlib
import re

from nanochat_jax.serve import server

VENDOR = server.WEB / "vendor"


def test_the_table_lists_every_vendored_file_with_its_version_and_checksum():
    lines = (VENDOR / "README.md").read_text().splitlines()
    rows = [re.findall(r"[^|`\s][^|`]*[^|`\s]", line) for line in lines if line.startswith("| ")][
        1:
    ]
    files = {path.relative_to(VENDOR).as_posix() for path in VENDOR.rglob("*") if path.is_file()}
    assert sorted(row[0] for row in rows) == sorted(files - {"README.md"})
    for file, _, version, _, _, checksum in rows:
        content = (VENDOR / file).read_bytes()
        assert hashlib.sha256(content).hexdigest() == checksum, file
        assert f"{file.split('/')[0]}/LICENSE" in files
        if not file.endswith("LICENSE"):
            assert re.search(rf"[v ]{re.escape(version)} ".encode(), content[:200]), file

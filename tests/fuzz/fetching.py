"""Manifests, archives, answers of a server, recorded checksums."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import mutations as m
import yaml
from cases import Case, Place
from world import manifest


def _odd_archive(place: Place) -> bytes:
    """An archive with members that point elsewhere."""
    rng = place.rng
    name = rng.choice(
        ("../../up.txt", "/tmp/abs.txt", "a/../../b.txt", "a\\..\\b.txt", "x" * 300, "dev", "link", "a", "\ud7ff", "")
    )
    buffer = io.BytesIO()
    if rng.random() < 0.5:
        with zipfile.ZipFile(buffer, "w") as packed:
            info = zipfile.ZipInfo(name)
            if name == "link":
                info.external_attr = 0o120777 << 16
            packed.writestr(info, "../../../elsewhere.txt")
            packed.writestr(rng.choice(("ok.txt", "a", "a/b", "link/x")), "ok")
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            member = tarfile.TarInfo(name)
            member.type = rng.choice(
                (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
            )
            member.linkname = rng.choice(("../../../elsewhere.txt", "/etc/passwd", name))
            member.mode = rng.choice((0o644, 0, 0o4777))
            tar.addfile(member, io.BytesIO(b""))
    return buffer.getvalue()


def fetch(place: Place) -> Case:
    """Harmed manifests, archives, answers and recorded checksums."""
    rng, folder = place.rng, place.folder
    base = manifest(place.world.folder / "served", place.url)
    path, cache, wrong = folder / "set.yaml", folder / "cache", {"set.yaml"}
    kind = rng.random()
    if kind < 0.5:
        mutated, touched = m.yaml_text(rng, base, place.canary)
        path.write_bytes(mutated)
        wrong |= touched | {file["name"] for file in base["files"]} | {place.url}
        if rng.random() < 0.05:
            m.of_path(rng, path, place.world.folder / "elsewhere.txt")
    elif kind < 0.85:
        which = rng.randrange(2)
        name = Path(base["files"][which]["url"]).name
        data = _odd_archive(place) if rng.random() < 0.5 else m.of_bytes(rng, place.served[name])
        place.served["odd" + name] = data
        digest = hashlib.sha256(data).hexdigest()
        base["files"] = [{**base["files"][which], "url": f"{place.url}/odd{name}", "checksum": f"sha256:{digest}"}]
        base["files"][0]["size"] = len(data) if rng.random() < 0.7 else m.number(rng)
        if base["files"][0]["size"] != base["files"][0]["size"] or abs(base["files"][0]["size"]) > 2**70:
            del base["files"][0]["size"]
        wrong |= {base["files"][0]["name"], "size"}
        path.write_text(yaml.safe_dump(base))
    else:
        path.write_text(yaml.safe_dump(base))
        recorded = cache / "fetched" / "fuzzed" / "checksums.json"
        recorded.parent.mkdir(parents=True)
        mutated, _ = m.json_text(rng, {"plain.txt": "sha256:" + "0" * 64, "x": "md5:0"}, place.canary)
        recorded.write_bytes(mutated)
        if rng.random() < 0.3:
            (recorded.parent / rng.choice(("plain.txt", "set.tar.gz", ".plain.txt.part", "set"))).write_bytes(
                rng.randbytes(50)
            )
        wrong |= {"checksums.json", "plain.txt", "set.tar.gz"}
    action = "fetch" if rng.random() < 0.9 else "info"
    return Case(["data", action, str(path), "--cache", str(cache)], wrong)

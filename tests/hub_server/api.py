"""The requests that the clients make, and how they are answered."""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .cards import card_metadata, card_problems
from .store import File, HubError, Repo

if TYPE_CHECKING:
    from . import Hub

TOKENS = {user: f"hf_{(user * 34)[:34]}" for user in ("anna", "ben")}
"""User to token; each writes to repositories under their own name."""

LFS_ENDINGS = (".safetensors", ".bin", ".pt", ".parquet", ".arrow", ".zip", ".jpg", ".jpeg", ".png", ".npy", ".onnx")
LFS_SIZE = 10 * 2**20
"""Files with such an ending, or of more bytes, are uploaded with LFS."""


# --------------------------------------------------------------------------------------------------------- who and what


async def answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HubError)
    headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
    return JSONResponse({"error": error.message}, error.status, headers=headers)


def hub_of(request: Request) -> Hub:
    return request.app.state.hub


def user_of(request: Request) -> str | None:
    """The user of the request's token; None without one."""
    token = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
    user = next((user for user, known in TOKENS.items() if known == token), None)
    if token and user is None:
        raise HubError(401, None, "Invalid credentials in Authorization header")
    return user


def signed_in(request: Request) -> str:
    user = user_of(request)
    if user is None:
        raise HubError(401, None, "Invalid username or password.")
    return user


def repo_of(request: Request, *, write: bool = False) -> Repo:
    """The repository that the path names, if this user may read it, or write to it."""
    user = signed_in(request) if write else user_of(request)
    kind, name = request.path_params["kind"] or "models", request.path_params["name"]
    found = hub_of(request).repos.get((kind.rstrip("/").removesuffix("s"), name))
    owner = name.split("/")[0]
    if found is None or (found.private and user != owner):
        raise HubError(404 if user else 401, "RepoNotFound", "Repository not found")
    if write and user != owner:
        raise HubError(403, None, f"You don't have the rights to push to {name}: it belongs to {owner}.")
    return found


def page(request: Request, repo: Repo) -> str:
    return f"{hub_of(request).url}/{'' if repo.kind == 'model' else repo.kind + 's/'}{repo.name}"


# --------------------------------------------------------------------------------------------- users and repositories


async def whoami(request: Request) -> Response:
    user = signed_in(request)
    token = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
    return JSONResponse({"type": "user", "id": user, "name": user, "fullname": user, "orgs": [], "auth": token})


async def create_repo(request: Request) -> Response:
    user, asked = signed_in(request), await request.json()
    kind, owner = asked.get("type") or "model", asked.get("organization") or user
    if owner != user:
        raise HubError(403, None, f'You don\'t have the rights to create a {kind} under the namespace "{owner}".')
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    repo = Repo(kind, f"{owner}/{asked['name']}", private)
    answer = {"url": page(request, repo), "name": repo.name, "id": repo.name}
    if (kind, repo.name) in hub_of(request).repos:
        return JSONResponse({**answer, "error": f"You already created this {kind} repo"}, 409)
    repo.commit("main", {}, "initial commit", user)
    hub_of(request).repos[kind, repo.name] = repo
    return JSONResponse(answer)


async def create_branch(request: Request) -> Response:
    repo, branch = repo_of(request, write=True), request.path_params["branch"]
    asked = json.loads(await request.body() or b"{}")
    if branch in repo.branches:
        raise HubError(409, None, f"Reference already exists: {branch}")
    repo.branches[branch] = repo.at(asked.get("startingPoint") or "main").id
    return JSONResponse({})


async def create_tag(request: Request) -> Response:
    repo = repo_of(request, write=True)
    repo.tags[(await request.json())["tag"]] = repo.at(request.path_params["revision"]).id
    return JSONResponse({})


# -------------------------------------------------------------------------------------------------------------- upload


async def validate_yaml(request: Request) -> Response:
    asked = await request.json()
    errors, warnings = card_problems(asked["content"], asked.get("repoType") or "model")
    said = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return JSONResponse(said, 400 if errors else 200)


async def preupload(request: Request) -> Response:
    """How each file is to be sent, and what is there already."""
    repo, asked = repo_of(request, write=True), await request.json()
    there = repo.at(request.path_params["revision"]).files
    ignored = (asked.get("gitIgnore") or "").split()

    def plan(path: str, size: int) -> dict[str, Any]:
        old = there.get(path)
        return {
            "path": path,
            "uploadMode": "lfs" if path.endswith(LFS_ENDINGS) or size > LFS_SIZE else "regular",
            "shouldIgnore": any(fnmatch.fnmatch(path, pattern) for pattern in ignored),
            "oid": None if old is None else old.sha256 if old.lfs else old.oid,
        }

    return JSONResponse({"files": [plan(file["path"], file["size"]) for file in asked["files"]]})


async def lfs_batch(request: Request) -> Response:
    """Where to send large files; nowhere for those that were sent before, in whatever commit."""
    repo, hub, asked = repo_of(request, write=True), hub_of(request), await request.json()
    verify = {"href": f"{page(request, repo)}.git/info/lfs/verify", "header": {}}
    objects = [{"oid": file["oid"], "size": file["size"]} for file in asked["objects"]]
    for file in objects:
        if file["oid"] not in hub.uploads:
            file["actions"] = {"upload": {"href": f"{hub.url}/_lfs/{file['oid']}", "header": {}}, "verify": verify}
    return JSONResponse({"transfer": "basic", "objects": objects})


async def lfs_put(request: Request) -> Response:
    content, oid = await request.body(), request.path_params["oid"]
    if hashlib.sha256(content).hexdigest() != oid:
        raise HubError(400, None, "The content is not that of the SHA-256.")
    hub_of(request).uploads[oid] = content
    return Response(headers={"ETag": f'"{oid}"'})


async def lfs_verify(request: Request) -> Response:
    asked = await request.json()
    return Response(status_code=200 if len(hub_of(request).uploads.get(asked["oid"], b"")) == asked["size"] else 404)


async def commit(request: Request) -> Response:
    """A header and one operation a line; all of them, or none."""
    user, repo, revision = signed_in(request), repo_of(request, write=True), request.path_params["revision"]
    files, header = dict(repo.at(revision).files), {}
    for line in (await request.body()).splitlines():
        operation = json.loads(line)
        key, value = operation["key"], operation["value"]
        if key == "header":
            header = value
        elif key == "file":
            files[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in hub_of(request).uploads:
                raise HubError(400, None, f"LFS pointer pointed to a file that does not exist: {value['path']}")
            files[value["path"]] = File(hub_of(request).uploads[value["oid"]], lfs=True)
        elif key == "deletedFile":
            files.pop(value["path"], None)
        elif key == "deletedFolder":
            files = {path: file for path, file in files.items() if not path.startswith(value["path"].rstrip("/") + "/")}
        else:
            raise HubError(400, None, f"Unknown operation {key}")
    if header.get("parentCommit", repo.at(revision).id) != repo.at(revision).id:
        raise HubError(412, None, "A commit has happened since. Please refresh and try again.")
    if "README.md" in files:
        errors, _ = card_problems(files["README.md"].content.decode(), repo.kind)
        if errors:
            raise HubError(400, None, f"Invalid metadata in README.md: {' '.join(errors)}")
    answer: dict[str, Any] = {"success": True, "hookOutput": ""}
    if request.query_params.get("create_pr"):
        number = 1 + sum(name.startswith("refs/pr/") for name in repo.branches)
        repo.branches[f"refs/pr/{number}"], revision = repo.at(revision).id, f"refs/pr/{number}"
        answer["pullRequestUrl"] = f"{page(request, repo)}/discussions/{number}"
    made = repo.commit(revision, files, header["summary"], user)
    return JSONResponse({**answer, "commitOid": made.id, "commitUrl": f"{page(request, repo)}/commit/{made.id}"})


# ------------------------------------------------------------------------------------------------------------ download


async def info(request: Request) -> Response:
    repo = repo_of(request)
    at = repo.at(request.path_params.get("revision", "main"))
    readme = at.files.get("README.md")
    card = (card_metadata(readme.content.decode()) if readme else None) or {}
    return JSONResponse(
        {
            "_id": hashlib.md5(repo.name.encode()).hexdigest()[:24],
            "id": repo.name,
            "modelId": repo.name,
            "author": repo.name.split("/")[0],
            "sha": at.id,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "createdAt": next(iter(repo.commits.values())).date,
            "lastModified": at.date,
            "downloads": 0,
            "likes": 0,
            "tags": card.get("tags") or [],
            "pipeline_tag": card.get("pipeline_tag"),
            "library_name": card.get("library_name"),
            "cardData": card,
            "sdk": card.get("sdk"),
            "siblings": [
                {"rfilename": path, "blobId": file.oid, "size": len(file.content)} for path, file in at.files.items()
            ],
        }
    )


async def tree(request: Request) -> Response:
    at = repo_of(request).at(request.path_params["revision"])
    base = request.path_params.get("path", "").strip("/")
    entries = at.entries()
    if base and entries.get(base, {}).get("type") != "directory":
        raise HubError(404, "EntryNotFound", f"{base} does not exist")
    deep = request.query_params.get("recursive", "").lower() in ("true", "1")
    below = {path[len(base) :].lstrip("/"): e for path, e in entries.items() if not base or path.startswith(base + "/")}
    return JSONResponse([entry for path, entry in below.items() if deep or "/" not in path])


async def paths_info(request: Request) -> Response:
    at = repo_of(request).at(request.path_params["revision"])
    entries = at.entries()
    asked = parse_qs((await request.body()).decode())["paths"]
    return JSONResponse([entries[path] for path in asked if path in entries])


async def refs(request: Request) -> Response:
    repo = repo_of(request)

    def listed(names: dict[str, str], prefix: str) -> list[dict[str, str]]:
        return [{"name": n, "ref": n if n[:5] == "refs/" else prefix + n, "targetCommit": c} for n, c in names.items()]

    pulls = {name: commit for name, commit in repo.branches.items() if name.startswith("refs/pr/")}
    branches = {name: commit for name, commit in repo.branches.items() if name not in pulls}
    said = {"branches": listed(branches, "refs/heads/"), "tags": listed(repo.tags, "refs/tags/"), "converts": []}
    return JSONResponse({**said, "pullRequests": listed(pulls, "")})


async def commits(request: Request) -> Response:
    history = repo_of(request).history(request.path_params["revision"])
    return JSONResponse(
        [{"id": c.id, "title": c.title, "message": "", "authors": [{"user": c.user}], "date": c.date} for c in history]
    )


async def resolve(request: Request) -> Response:
    """A file: its content, or for LFS a redirect to the other host."""
    at = repo_of(request).at(request.path_params["revision"])
    file = at.files.get(request.path_params["path"])
    headers = {"X-Repo-Commit": at.id}
    if file is None:
        headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
        return JSONResponse({"error": "Entry not found"}, 404, headers=headers)
    if file.lfs:
        linked = {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
        where = f"{hub_of(request).cdn}/_cdn/{file.sha256}"
        return Response(status_code=302, headers={**headers, **linked, "ETag": f'"{file.oid}"', "Location": where})
    return send_bytes(request, file.content, {**headers, "ETag": f'"{file.oid}"'})


async def cdn(request: Request) -> Response:
    oid = request.path_params["oid"]
    content = hub_of(request).uploads.get(oid)
    if content is None:
        raise HubError(404, None, "No such object")
    return send_bytes(request, content, {"ETag": f'"{oid}"'})


def send_bytes(request: Request, content: bytes, headers: dict[str, str]) -> Response:
    """The content, or the range of it that the request asks for."""
    headers = {**headers, "Accept-Ranges": "bytes"}
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if wanted is None:
        return Response(content, headers=headers, media_type="application/octet-stream")
    start, end = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
    if start > end:
        return Response(status_code=416, headers={"Content-Range": f"bytes */{len(content)}"})
    headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
    return Response(content[start : end + 1], 206, headers=headers, media_type="application/octet-stream")


# -------------------------------------------------------------------------------------------------------------- routes


class _Text(Convertor[str]):
    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


def _convertor(name: str, regex: str) -> None:
    register_url_convertor(name, type(name, (_Text,), {"regex": regex})())


_convertor("plural", "models|datasets|spaces")
_convertor("prefix", "(?:datasets/|spaces/)?")
_convertor("repo", r"[\w.\-]+/[\w.\-]+?")
_convertor("rev", r"refs/\w+/[\w.\-]+|[^/]+")


def routes() -> list[Route]:
    api, plain = "/api/{kind:plural}/{name:repo}", "/{kind:prefix}{name:repo}"
    get, post = ["GET"], ["POST"]
    return [
        Route("/api/whoami-v2", whoami, methods=get),
        Route("/api/repos/create", create_repo, methods=post),
        Route("/api/validate-yaml", validate_yaml, methods=post),
        Route(f"{api}/branch/{{branch:path}}", create_branch, methods=post),
        Route(f"{api}/tag/{{revision:rev}}", create_tag, methods=post),
        Route(f"{api}/preupload/{{revision:rev}}", preupload, methods=post),
        Route(f"{plain}.git/info/lfs/objects/batch", lfs_batch, methods=post),
        Route(f"{plain}.git/info/lfs/verify", lfs_verify, methods=post),
        Route("/_lfs/{oid}", lfs_put, methods=["PUT"]),
        Route(f"{api}/commit/{{revision:rev}}", commit, methods=post),
        Route(api, info, methods=get),
        Route(f"{api}/revision/{{revision:rev}}", info, methods=get),
        Route(f"{api}/tree/{{revision:rev}}", tree, methods=get),
        Route(f"{api}/tree/{{revision:rev}}/{{path:path}}", tree, methods=get),
        Route(f"{api}/paths-info/{{revision:rev}}", paths_info, methods=post),
        Route(f"{api}/refs", refs, methods=get),
        Route(f"{api}/commits/{{revision:rev}}", commits, methods=get),
        Route(f"{plain}/resolve/{{revision:rev}}/{{path:path}}", resolve, methods=["GET", "HEAD"]),
        Route("/_cdn/{oid}", cdn, methods=["GET", "HEAD"]),
    ]

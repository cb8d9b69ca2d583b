"""QEMU's own Python client drives two monitors: client.py SOURCE DESTINATION URI.

SOURCE and DESTINATION are QMP sockets. The source's guest is paused; the destination was started
with `--incoming defer`. Ends with status 0 when everything was as with a QEMU.
"""

import asyncio
import sys

from qemu.qmp import EventListener, ExecuteError, QMPClient

LIMIT = 30


async def main(source_path: str, destination_path: str, uri: str) -> None:
    source = await connect(source_path)
    destination = await connect(destination_path)
    await introspect(source)
    await stop_and_continue(source)
    await refuse(source)
    await migrate(source, destination, uri)
    await quit_(source)
    await quit_(destination)


async def connect(path: str) -> QMPClient:
    client = QMPClient("test")
    await asyncio.wait_for(client.connect(path), LIMIT)
    version = client.greeting.QMP.version["qemu"]
    assert version["major"] >= 8, version
    return client


async def introspect(client: QMPClient) -> None:
    names = {command["name"] for command in await client.execute("query-commands")}
    assert {"stop", "cont", "quit", "migrate", "query-migrate"} <= names, names
    assert await client.execute("query-kvm") == {"enabled": True, "present": True}


async def stop_and_continue(client: QMPClient) -> None:
    for verb, event, status in [
        ("cont", "RESUME", "running"),
        ("stop", "STOP", "paused"),
        ("cont", "RESUME", "running"),
    ]:
        with client.listener(event) as events:
            await client.execute(verb)
            seen = await asyncio.wait_for(events.get(), LIMIT)
            assert set(seen["timestamp"]) == {"seconds", "microseconds"}, seen
        await expect_status(client, status)


async def refuse(client: QMPClient) -> None:
    for verb, arguments, error_class in [
        ("no-such-verb", None, "CommandNotFound"),
        ("stop", {"force": True}, "GenericError"),
        ("migrate", {"uri": "nowhere"}, "GenericError"),
    ]:
        try:
            await client.execute(verb, arguments)
        except ExecuteError as error:
            assert error.error_class == error_class, (verb, error)
        else:
            raise AssertionError(f"{verb} {arguments} was not refused")


async def migrate(source: QMPClient, destination: QMPClient, uri: str) -> None:
    await expect_status(destination, "inmigrate")
    await destination.execute("migrate-incoming", {"uri": uri})
    events_on = {"capability": "events", "state": True}
    await source.execute("migrate-set-capabilities", {"capabilities": [events_on]})
    with source.listener("MIGRATION") as events:
        await source.execute("migrate", {"uri": uri})
        seen = []
        while not seen or seen[-1] not in ("completed", "failed"):
            event = await asyncio.wait_for(events.get(), LIMIT)
            seen.append(event["data"]["status"])
    answer = await source.execute("query-migrate")
    assert seen[-1] == answer["status"] == "completed", (seen, answer)
    assert seen[0] == "setup" and "active" in seen, seen
    assert answer["downtime"] <= answer["total-time"], answer
    assert answer["ram"]["total"] == 128 << 20, answer
    await expect_status(source, "postmigrate")
    await expect_status(destination, "running")


async def expect_status(client: QMPClient, status: str) -> None:
    answer = await client.execute("query-status")
    assert answer["status"] == status, answer
    assert answer["running"] == (status == "running"), answer


async def quit_(client: QMPClient) -> None:
    ends = EventListener("SHUTDOWN")
    with client.listen(ends):
        await client.execute("quit")
        end = await asyncio.wait_for(ends.get(), LIMIT)
        assert end["data"] == {"guest": False, "reason": "host-qmp-quit"}, end


asyncio.run(main(*sys.argv[1:]))

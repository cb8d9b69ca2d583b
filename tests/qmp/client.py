"""QEMU's own Python client drives a monitor: python3 client.py SOCKET.

The guest is started and paused. Ends with status 0 when everything was as with a QEMU.
"""

import asyncio
import sys

from qemu.qmp import EventListener, ExecuteError, QMPClient


async def main(path: str) -> None:
    client = QMPClient("test")
    await asyncio.wait_for(client.connect(path), 10)
    version = client.greeting.QMP.version["qemu"]
    assert version["major"] >= 8, version

    names = {command["name"] for command in await client.execute("query-commands")}
    assert {"stop", "cont", "quit", "migrate", "query-migrate"} <= names, names

    for verb, event, status in [
        ("cont", "RESUME", "running"),
        ("stop", "STOP", "paused"),
        ("cont", "RESUME", "running"),
    ]:
        with client.listener(event) as events:
            await client.execute(verb)
            seen = await asyncio.wait_for(events.get(), 10)
            assert set(seen["timestamp"]) == {"seconds", "microseconds"}, seen
        answer = await client.execute("query-status")
        assert answer["status"] == status, answer
        assert answer["running"] == (status == "running"), answer

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

    with EventListener("SHUTDOWN") as ends:
        client.register_listener(ends)
        await client.execute("quit")
        end = await asyncio.wait_for(ends.get(), 10)
        assert end["data"] == {"guest": False, "reason": "host-qmp-quit"}, end


asyncio.run(main(sys.argv[1]))

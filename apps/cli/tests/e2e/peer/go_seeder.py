"""The seeder and the leecher of the Go programs on gRPC's own C core, with messages written out by hand: nothing here
shares a line with the Rust implementation that it is tested against.

    go_seeder.py leech TARGET SIZE CHUNK FILE
        copies the region of SIZE bytes at TARGET in chunks of CHUNK bytes to FILE, says "copied", waits for a line, has
        it handed over, copies what was written meanwhile, and says "has all of it"
    go_seeder.py seed FILE CHUNK
        seeds what is in FILE, says "listens on HOST:PORT", and writes what it is told in lines like "write OFFSET TEXT";
        says "suspended" when it has handed over, and ends when the other side has everything
"""

import sys
import threading
from concurrent import futures

import grpc

SERVICE = "com.pojtinger.felicitas.r3map.migration.v1.Seeder"


def varint(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


def read_varint(message, at):
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, at


def parse(message):
    """Field numbers with their values, which are numbers or bytes."""
    fields, at = {}, 0
    while at < len(message):
        key, at = read_varint(message, at)
        value, at = read_varint(message, at)
        if key & 7 == 2:
            value, at = message[at : at + value], at + value
        fields[key >> 3] = value
    return fields


def say(line):
    print(line, flush=True)


def leech(target, size, chunk, file):
    channel = grpc.insecure_channel(target)
    track, read_at, sync, close = (channel.unary_unary(f"/{SERVICE}/{name}") for name in ("Track", "ReadAt", "Sync", "Close"))
    region = bytearray(size)

    def pull(offset):
        reply = parse(read_at(b"\x08" + varint(chunk) + b"\x10" + varint(offset)))
        # A leecher in Go takes nothing but whole chunks.
        assert reply[1] == len(reply[2]) == chunk, reply[1]
        there = min(chunk, size - offset)
        region[offset : offset + there] = reply[2][:there]

    try:
        track(b"")
    except grpc.RpcError as error:
        return say(f"refused: {error.code().name}")
    with futures.ThreadPoolExecutor(max_workers=8) as pool:
        list(pool.map(pull, range(0, size, chunk)))
    say("copied")
    sys.stdin.readline()
    packed, at, dirty = parse(sync(b"")).get(1, b""), 0, []
    while at < len(packed):
        offset, at = read_varint(packed, at)
        dirty.append(offset)
    assert len(set(dirty)) == len(dirty) and all(offset % chunk == 0 and offset < size for offset in dirty), dirty
    list(map(pull, dirty))
    with open(file, "wb") as out:
        out.write(region)
    say(f"has all of it, of which {len(dirty)} chunks came twice")
    close(b"")


def seed(file, chunk):
    with open(file, "rb") as source:
        region = bytearray(source.read())
    lock, ended, state = threading.Lock(), threading.Event(), {"dirty": None, "suspended": False}

    def read_at(request, _):
        args = parse(request)
        length, offset = args.get(1, 0), args.get(2, 0)
        with lock:
            bytes_ = bytes(region[offset : offset + length]).ljust(length, b"\0")
        return b"\x08" + varint(length) + b"\x12" + varint(length) + bytes_

    def track(_, __):
        with lock:
            state["dirty"] = state["dirty"] or []
        return b""

    def sync(_, __):
        with lock:
            dirty, state["dirty"], state["suspended"] = state["dirty"] or [], None, True
        packed = b"".join(map(varint, dirty))
        say("suspended")
        return b"\x0a" + varint(len(packed)) + packed if packed else b""

    def close(_, __):
        if state["suspended"]:
            ended.set()
        return b""

    def write():
        for line in sys.stdin:
            _, offset, text = line.split()
            offset, bytes_ = int(offset), text.encode()
            with lock:
                assert not state["suspended"]
                region[offset : offset + len(bytes_)] = bytes_
                first = offset - offset % chunk
                if state["dirty"] is not None and first not in state["dirty"]:
                    state["dirty"].append(first)
            say(f"written at {offset}")

    handlers = {"ReadAt": read_at, "Track": track, "Sync": sync, "Close": close}
    handlers = {name: grpc.unary_unary_rpc_method_handler(handler) for name, handler in handlers.items()}
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=8))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    threading.Thread(target=write, daemon=True).start()
    say(f"listens on 127.0.0.1:{port}")
    ended.wait()
    say("closed")
    server.stop(grace=1).wait()


if __name__ == "__main__":
    if sys.argv[1] == "leech":
        leech(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
    else:
        seed(sys.argv[2], int(sys.argv[3]))

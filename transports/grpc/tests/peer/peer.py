"""The mount service of the Go programs on gRPC's own C core, with messages written out by hand: nothing here shares a
line with the Rust implementation that it is tested against.

    peer.py serve SIZE    serves a region of zeros in memory, says "listens on HOST:PORT", and runs until killed
    peer.py check TARGET SIZE
                          reads and writes the region of zeros at TARGET as a Go client does, and says "agrees"
"""

import sys
import threading
from concurrent import futures

import grpc

SERVICE = "com.pojtinger.felicitas.r3map.mount.v1.Backend"
# What both sides of the Go programs accept in one message.
MESSAGE = 4 << 20
MAX_READ = 32 << 20


def varint(value):
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def number(field, value):
    return varint(field << 3) + varint(value) if value else b""


def data(field, value):
    return varint(field << 3 | 2) + varint(len(value)) + value if value else b""


def parse(message):
    fields, at = {}, 0

    def read():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = read()
        if key & 7 == 0:
            value = read()
            fields[key >> 3] = value - (1 << 64) if value >> 63 else value
        else:
            assert key & 7 == 2, key
            length = read()
            fields[key >> 3] = message[at : at + length]
            at += length
            assert at <= len(message)
    return fields


def serve(size):
    region, lock = bytearray(size), threading.Lock()

    def read_at(request, context):
        args = parse(request)
        length, offset = args.get(1, 0), args.get(2, 0)
        if length > MAX_READ:
            context.abort(grpc.StatusCode.UNKNOWN, "max chunk size exceeded")
        if offset + length > size:
            context.abort(grpc.StatusCode.UNKNOWN, "EOF")
        with lock:
            return number(1, length) + data(2, bytes(region[offset : offset + length]))

    def write_at(request, context):
        args = parse(request)
        offset, bytes_ = args.get(1, 0), args.get(2, b"")
        if offset + len(bytes_) > size:
            context.abort(grpc.StatusCode.UNKNOWN, "short write")
        with lock:
            region[offset : offset + len(bytes_)] = bytes_
        return number(1, len(bytes_))

    def sync(request, context):
        assert request == b""
        return b""

    handlers = {"ReadAt": read_at, "WriteAt": write_at, "Sync": sync}
    handlers = {name: grpc.unary_unary_rpc_method_handler(handler) for name, handler in handlers.items()}
    options = [("grpc.max_receive_message_length", MESSAGE), ("grpc.max_send_message_length", -1)]
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=8), options=options)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(f"listens on 127.0.0.1:{port}", flush=True)
    server.wait_for_termination()


def expect_error(call, request, code, text):
    try:
        call(request)
    except grpc.RpcError as error:
        assert (error.code(), error.details()) == (code, text), (error.code(), error.details())
        return
    raise AssertionError(f"{request} was answered")


def check(target, size):
    options = [("grpc.max_receive_message_length", MESSAGE), ("grpc.max_send_message_length", MESSAGE)]
    channel = grpc.insecure_channel(target, options=options)
    read_at, write_at, sync = (channel.unary_unary(f"/{SERVICE}/{name}") for name in ("ReadAt", "WriteAt", "Sync"))
    chunk, last = 4096, size // 4096

    assert read_at(bytes.fromhex("088020")) == number(1, chunk) + data(2, bytes(chunk))
    assert write_at(bytes.fromhex("0880601204deadbeef")) == number(1, 4)
    assert read_at(number(1, 8) + number(2, 12286)) == number(1, 8) + data(2, b"\0\0\xde\xad\xbe\xef\0\0")
    assert sync(b"") == b""

    written = {index: bytes([index % 251 + 1]) * chunk for index in range(last)}
    calls = [write_at.future(number(1, index * chunk) + data(2, content)) for index, content in written.items()]
    assert all(call.result() == number(1, chunk) for call in calls)
    calls = {index: read_at.future(number(1, chunk) + number(2, index * chunk)) for index in written}
    assert all(calls[index].result() == number(1, chunk) + data(2, content) for index, content in written.items())

    unknown = grpc.StatusCode.UNKNOWN
    expect_error(read_at, number(1, MAX_READ + 1), unknown, "max chunk size exceeded")
    expect_error(read_at, number(1, chunk) + number(2, size - 1), unknown, "EOF")
    expect_error(read_at, number(1, -1), grpc.StatusCode.INVALID_ARGUMENT, "negative length")
    longest = MESSAGE - 10
    assert len(read_at(number(1, longest))) == MESSAGE
    print("agrees", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        check(sys.argv[2], int(sys.argv[3]))

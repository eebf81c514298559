"""The handshake and the connection, without sockets: two ends joined by their bytes."""

from __future__ import annotations

import dataclasses
import os

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fanout.exceptions import (
    AuthError,
    ConnectionError,
    Error,
    InternalError,
    InvalidError,
    PermissionDeniedError,
    ProtocolError,
    VersionError,
)
from fanout.protocol import frames
from fanout.protocol import messages as m
from fanout.protocol.connection import TRANSITIONS, Cause, Connection, State
from fanout.protocol.handshake import (
    DIALLER_LABEL,
    ContainerDialler,
    ContainerListener,
    DiallerHandshake,
    ListenerHandshake,
    make_proof,
)
from fanout.protocol.join import Address, JoinString, Token
from tests.strategies import frame_of

CLIENT = Token("c1", "client", b"c" * 32)
WORKER = Token("w1", "worker", b"w" * 32)
TOKENS = {token.token_id: token for token in (CLIENT, WORKER)}


def hello_of(token: Token, **changes: object) -> m.Hello:
    hello = m.Hello(m.PROTOCOL_VERSION, token.role, token.token_id, bytes(16), b"d" * 32, {})
    return dataclasses.replace(hello, **changes)  # type: ignore[arg-type]


def dialler(token: Token, fingerprint: bytes = b"", **changes: object) -> Connection:
    return Connection(DiallerHandshake(hello_of(token, **changes), token.secret, fingerprint))


def listener(fingerprint: bytes = b"", nonce: bytes = b"l" * 32) -> Connection:
    return Connection(
        ListenerHandshake(
            nonce, b"?" * 32, TOKENS.get, lambda hello, role: m.Welcome(7, {}), fingerprint
        )
    )


def outgoing(connection: Connection) -> bytes:
    return b"".join(connection.data_to_send())


def join(dialling: Connection, listening: Connection, step: int = 1 << 20) -> list[Error]:
    """Carry bytes both ways until nobody has any; return what the ends raised."""
    errors: list[Error] = []
    ends = [(dialling, listening), (listening, dialling)]
    while any(source.outgoing_size for source, _ in ends):
        for source, target in ends:
            data = outgoing(source)
            for start in range(0, len(data), step):
                try:
                    target.receive_data(data[start : start + step])
                except Error as error:
                    errors.append(error)
    return errors


def joined(token: Token) -> tuple[Connection, Connection]:
    pair = dialler(token), listener()
    assert join(*pair) == []
    return pair


@pytest.mark.parametrize("token", [CLIENT, WORKER], ids=["client", "worker"])
@pytest.mark.parametrize("step", [1, 7, 1 << 20])
def test_both_ends_open_when_both_hold_the_secret(token: Token, step: int) -> None:
    dialling, listening = dialler(token, b"f" * 32), listener(b"f" * 32)
    assert join(dialling, listening, step) == []
    assert dialling.state is listening.state is State.OPEN
    assert dialling.handshake.peer == m.Welcome(7, {})
    assert listening.handshake.peer == hello_of(token)


def test_the_secret_never_travels() -> None:
    dialling, listening = dialler(CLIENT), listener()
    seen = b""
    for _ in range(3):
        for source, target in ((dialling, listening), (listening, dialling)):
            data = outgoing(source)
            seen += data
            target.receive_data(data)
    assert dialling.state is State.OPEN
    assert CLIENT.secret not in seen


def test_a_dialler_with_a_wrong_secret_finds_that_the_listener_cannot_prove_it() -> None:
    wrong = Token(CLIENT.token_id, "client", b"x" * 32)
    dialling, listening = dialler(wrong), listener()
    (error,) = join(dialling, listening)
    assert isinstance(error, AuthError)
    assert "fanout scheduler" in str(error)
    assert isinstance(dialling.error, AuthError)
    assert isinstance(listening.error, AuthError)
    assert listening.state is State.CLOSING


def test_a_token_that_is_withdrawn_in_mid_handshake_lets_nobody_in() -> None:
    tokens = dict(TOKENS)
    listening = Connection(
        ListenerHandshake(b"l" * 32, b"?" * 32, tokens.get, lambda hello, role: m.Welcome(7, {}))
    )
    dialling = dialler(CLIENT)
    listening.receive_data(outgoing(dialling))
    dialling.receive_data(outgoing(listening))
    del tokens[CLIENT.token_id]
    with pytest.raises(AuthError, match="does not accept this token"):
        listening.receive_data(outgoing(dialling))
    assert listening.state is State.CLOSING


@pytest.mark.parametrize("token_id", ["c1", "nobody"], ids=["known", "unknown"])
def test_a_forged_proof_is_refused_in_the_same_words_for_known_and_unknown_tokens(
    token_id: str,
) -> None:
    listening = listener()
    hello = hello_of(CLIENT, token_id=token_id)
    listening.receive_data(frame_of(hello))
    (challenge,) = frames.FrameReader().feed(outgoing(listening))
    assert isinstance(m.decode(*challenge), m.Challenge)
    with pytest.raises(AuthError):
        listening.receive_data(frame_of(m.Proof(b"x" * 32)))
    (goodbye,) = frames.FrameReader().feed(outgoing(listening))
    assert m.decode(*goodbye) == m.Goodbye(
        "auth",
        "the scheduler does not accept this token; get a join string from `fanout scheduler`",
    )


@pytest.mark.parametrize("fault", ["bit", "cut", "grown"])
def test_every_bit_of_a_proof_counts(fault: str) -> None:
    dialling = dialler(CLIENT)
    hello = outgoing(dialling)
    proof_size = 32
    for bit in range(proof_size * 8):
        listening = listener()
        listening.receive_data(hello)
        ((header, payload),) = frames.FrameReader().feed(outgoing(listening))
        challenge = m.decode(header, payload)
        assert isinstance(challenge, m.Challenge)
        right = make_proof(DIALLER_LABEL, CLIENT.secret, hello_of(CLIENT), challenge.nonce, b"")
        forged = bytearray(right)
        forged[bit // 8] ^= 1 << bit % 8
        wrong = {"bit": bytes(forged), "cut": right[: bit // 8], "grown": right + b"x"}[fault]
        with pytest.raises((AuthError, ProtocolError)):
            listening.receive_data(frame_of(m.Proof(wrong)))
        assert listening.state is not State.OPEN
    listening = listener()
    listening.receive_data(hello)
    outgoing(listening)
    listening.receive_data(frame_of(m.Proof(right)))
    assert listening.state is State.OPEN, "the right one is let in"


def test_the_secret_that_stands_in_for_unknown_tokens_opens_nothing() -> None:
    dialling, listening = dialler(Token("nobody", "client", b"?" * 32)), listener()
    (error,) = join(dialling, listening)
    assert isinstance(error, AuthError)
    assert not listening.handshake.is_done


def test_a_token_proves_its_own_role_only() -> None:
    dialling, listening = dialler(WORKER, role="client"), listener()
    errors = join(dialling, listening)
    assert [type(error) for error in errors] == [PermissionDeniedError]
    assert isinstance(dialling.error, AuthError)
    assert "for the role 'worker', not 'client'" in str(dialling.error)
    assert not listening.handshake.is_done


def test_a_proof_sent_back_to_its_maker_proves_nothing() -> None:
    listening = listener()
    listening.receive_data(frame_of(hello_of(CLIENT)))
    (frame,) = frames.FrameReader().feed(outgoing(listening))
    challenge = m.decode(*frame)
    assert isinstance(challenge, m.Challenge)
    with pytest.raises(AuthError):
        listening.receive_data(frame_of(m.Proof(challenge.proof)))


def test_a_hello_sent_back_to_its_maker_is_refused() -> None:
    dialling = dialler(CLIENT)
    with pytest.raises(ProtocolError, match="Hello must not come"):
        dialling.receive_data(outgoing(dialling))


def test_a_recorded_handshake_does_not_fit_another_nonce() -> None:
    dialling, listening = dialler(CLIENT), listener()
    hello = outgoing(dialling)
    listening.receive_data(hello)
    dialling.receive_data(outgoing(listening))
    proof = outgoing(dialling)
    listening.receive_data(proof)
    assert listening.state is State.OPEN
    again = listener(nonce=b"m" * 32)
    with pytest.raises(AuthError):
        again.receive_data(hello + proof)


def test_a_relay_with_another_certificate_fails() -> None:
    dialling, listening = dialler(CLIENT, b"relay".ljust(32)), listener(b"real".ljust(32))
    (error,) = join(dialling, listening)
    assert isinstance(error, AuthError)
    assert not dialling.handshake.is_done
    assert not listening.handshake.is_done


def test_every_field_of_the_context_changes_the_proof() -> None:
    base = hello_of(CLIENT)
    context = ("label", CLIENT.secret, base, b"l" * 32, b"")
    proofs = {
        make_proof(*context),
        make_proof("other", *context[1:]),
        make_proof("label", WORKER.secret, *context[2:]),
        make_proof("label", CLIENT.secret, base, b"m" * 32, b""),
        make_proof("label", CLIENT.secret, base, b"l" * 32, b"f" * 32),
    }
    for change in ({"protocol": 99}, {"role": "worker"}, {"token_id": "c2"}, {"nonce": b"e" * 32}):
        changed = dataclasses.replace(base, **change)
        proofs.add(make_proof("label", CLIENT.secret, changed, b"l" * 32, b""))
    assert len(proofs) == 9


def test_another_protocol_version_is_refused_by_both_numbers() -> None:
    dialling, listening = dialler(CLIENT, protocol=99), listener()
    errors = join(dialling, listening)
    assert [type(error) for error in errors] == [VersionError]
    assert isinstance(dialling.error, VersionError)
    assert f"fanout protocol {m.PROTOCOL_VERSION}, the other 99" in str(dialling.error)


def test_a_version_is_recognised_in_a_hello_that_cannot_be_decoded() -> None:
    header = msgpack.packb([m.Hello.KIND, 99, "new", "fields", {"of": "the future"}])
    listening = listener()
    with pytest.raises(VersionError):
        listening.receive_data(frames.prefix(header, 0) + header)


def test_nothing_but_the_handshake_is_taken_before_it_is_done() -> None:
    for message in (m.Heartbeat(1), m.AskStatus(1), m.Proof(bytes(32)), m.Welcome(1, {})):
        listening = listener()
        with pytest.raises(ProtocolError, match=type(message).__name__):
            listening.receive_data(frame_of(message))
        assert listening.state is State.CLOSING


@pytest.mark.parametrize(
    ("header_size", "payload_size"),
    [(frames.HANDSHAKE_SIZE_BYTES_MAX + 1, 0), (10, 1), (0, 0), (0x20544547, 0x5448202F)],
    ids=["long header", "payload", "empty", "HTTP"],
)
def test_a_stranger_gets_no_room(header_size: int, payload_size: int) -> None:
    listening = listener()
    with pytest.raises(ProtocolError, match="Is the peer fanout"):
        listening.receive_data(frames.PREFIX.pack(header_size, payload_size))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=60), max_size=6), st.booleans())
def test_garbage_ends_a_connection_and_raises_nothing_else(
    reads: list[bytes], is_open: bool
) -> None:
    connection = joined(CLIENT)[1] if is_open else listener()
    for data in reads:
        try:
            connection.receive_data(data)
        except (ProtocolError, VersionError):
            assert connection.state is State.CLOSING
            assert connection.receive_data(frame_of(m.AskStatus(1))) == []


def test_messages_behind_the_proof_in_the_same_read_are_delivered() -> None:
    dialling, listening = dialler(CLIENT), listener()
    listening.receive_data(outgoing(dialling))
    dialling.receive_data(outgoing(listening))
    define = m.DefineFunction(bytes(16), bytes(16), "f" * 20_000, {}, [], b"p" * 100_000)
    data = outgoing(dialling) + frame_of(m.AskStatus(1)) + frame_of(define)
    assert listening.receive_data(data) == [m.AskStatus(1), define]


def test_a_worker_that_sends_a_call_is_told_why_it_is_cut() -> None:
    dialling, listening = joined(WORKER)
    dialling.send(m.OpenCall(bytes(16), bytes(16), False, True, None))
    (error,) = join(dialling, listening)
    assert isinstance(error, ProtocolError)
    assert "OpenCall is not allowed" in str(error)
    assert listening.state is dialling.state is State.CLOSING
    assert isinstance(dialling.error, ProtocolError)
    assert "OpenCall" in str(dialling.error)


def test_nothing_of_a_read_with_a_fault_is_delivered() -> None:
    _, listening = joined(CLIENT)
    with pytest.raises(ProtocolError, match="unknown message kind"):
        listening.receive_data(
            frame_of(m.AskStatus(1)) + frames.prefix(b"\x91\xcd\x0f\xff", 0) + b"\x91\xcd\x0f\xff"
        )
    assert listening.receive_data(frame_of(m.AskStatus(2))) == []


def test_goodbye_is_the_last_message_and_ends_the_connection_in_order() -> None:
    dialling, listening = joined(CLIENT)
    dialling.send(m.AskStatus(1))
    dialling.close(m.Goodbye("done", "that was all"))
    dialling.send(m.AskStatus(2))
    data = outgoing(dialling) + frame_of(m.AskStatus(3))
    assert listening.receive_data(data) == [m.AskStatus(1), m.Goodbye("done", "that was all")]
    assert listening.has_peer_left
    listening.receive_end()
    assert listening.error is None
    assert listening.state is State.CLOSED


def test_a_goodbye_that_names_an_error_arrives_as_that_error() -> None:
    for code, cls in (
        ("auth", AuthError),
        ("permission", PermissionDeniedError),
        ("protocol", ProtocolError),
        ("internal", InternalError),
        ("refused", ConnectionError),
    ):
        dialling, listening = joined(CLIENT)
        listening.close(m.Goodbye(code, "why"))
        dialling.receive_data(outgoing(listening))
        assert type(dialling.error) is cls


def test_two_goodbyes_at_once_leave_nobody_waiting() -> None:
    dialling, listening = joined(CLIENT)
    dialling.close(m.Goodbye("a", ""))
    listening.send(m.StatusInfo(1, {}))
    listening.close(m.Goodbye("b", ""))
    there, back = outgoing(dialling), outgoing(listening)
    assert dialling.receive_data(back) == []
    assert listening.receive_data(there) == []
    assert dialling.has_peer_left
    assert listening.has_peer_left


def test_an_end_without_a_goodbye_is_an_error() -> None:
    dialling, _ = joined(CLIENT)
    dialling.receive_end()
    assert isinstance(dialling.error, ConnectionError)
    assert dialling.state is State.CLOSED
    assert dialling.data_to_send() == []


def test_a_frame_over_the_limit_is_refused_at_the_sender_and_harms_nothing() -> None:
    dialling, listening = joined(CLIENT)
    with pytest.raises(ProtocolError, match="over the limit"):
        dialling.send(m.DefineFunction(bytes(16), bytes(16), "f", {"x": bytes(2 << 20)}, [], b""))
    dialling.send(m.AskStatus(1))
    assert listening.receive_data(outgoing(dialling)) == [m.AskStatus(1)]


def test_transitions_lead_to_closed_and_nowhere_from_there() -> None:
    assert set(TRANSITIONS) == set(State)
    assert TRANSITIONS[State.CLOSED] == {}
    for state in (State.OPENING, State.OPEN, State.CLOSING):
        assert TRANSITIONS[state][Cause.ENDED] is State.CLOSED
        assert State.OPENING not in TRANSITIONS[state].values()


def test_a_bug_in_a_callback_closes_the_connection_and_is_raised() -> None:
    def broken(hello: m.Hello, role: str) -> m.Welcome:
        raise RuntimeError("bug")

    handshake = ListenerHandshake(b"l" * 32, b"?" * 32, TOKENS.get, broken)
    dialling, listening = dialler(CLIENT), Connection(handshake)
    listening.receive_data(outgoing(dialling))
    dialling.receive_data(outgoing(listening))
    with pytest.raises(RuntimeError):
        listening.receive_data(outgoing(dialling))
    assert listening.state is State.CLOSING
    dialling.receive_data(outgoing(listening))
    assert isinstance(dialling.error, InternalError)


def test_a_container_is_let_in_by_its_secret() -> None:
    hello = m.Hello(m.PROTOCOL_VERSION, "container", "5", bytes(16), b"s" * 32, {})

    def accept(seen: m.Hello) -> m.Welcome | None:
        return m.Welcome(1, {}) if seen.nonce == b"s" * 32 else None

    dialling = Connection(ContainerDialler(hello, m.TO_CLIENT))
    listening = Connection(ContainerListener(accept, m.FROM_NESTED_CLIENT))
    assert join(dialling, listening) == []
    assert dialling.state is listening.state is State.OPEN
    for wrong in ({"nonce": b"x" * 32}, {"role": "client"}):
        changed = dataclasses.replace(hello, **wrong)
        dialling = Connection(ContainerDialler(changed, m.TO_CLIENT))
        listening = Connection(ContainerListener(accept, m.FROM_NESTED_CLIENT))
        assert [type(error) for error in join(dialling, listening)] == [AuthError]
        assert isinstance(dialling.error, AuthError)


# --- join strings ---------------------------------------------------------------------------------


@given(
    st.sampled_from(["127.0.0.1", "::1", "node-7.example.org", "fe80::1%eth0"]),
    st.integers(1, 65535),
    st.sampled_from(["client", "worker"]),
    st.binary(min_size=32, max_size=32),
    st.none() | st.binary(min_size=32, max_size=32),
)
def test_a_join_string_reads_back(
    host: str, port: int, role: str, secret: bytes, fingerprint: bytes | None
) -> None:
    one = JoinString.of(Token("id-1_x", role, secret), Address(host, port), fingerprint)
    assert JoinString.parse(f" {one}\n") == one


@given(st.binary(min_size=1, max_size=200).filter(lambda path: b"\0" not in path))
def test_a_join_string_of_a_socket_reads_back_and_is_one_word(path: bytes) -> None:
    one = JoinString.of(CLIENT, Address(path=os.fsdecode(b"/" + path)))
    assert JoinString.parse(str(one)) == one
    assert str(one).isprintable()
    assert len(str(one).split()) == 1


@pytest.mark.parametrize(
    ("where", "part"), [("/run/a%00b", "holds a NUL"), ("/run/a?fp=" + "66" * 32, "nothing can")]
)
def test_a_wrong_path_in_a_join_string_is_refused(where: str, part: str) -> None:
    good = str(JoinString.of(CLIENT, Address("127.0.0.1", 8786)))
    with pytest.raises(InvalidError, match=part):
        JoinString.parse(good.replace("127.0.0.1:8786", where))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (("fanout://", "http://"), "begin with fanout://"),
        (("@", ""), "no @"),
        (("client.", "client"), "<role>.<token id>:<secret>"),
        (("client.", "boss."), "role 'boss'"),
        (("c1:", ":"), "token id ''"),
        (("c1:", "c1/..:"), "token id 'c1/..'"),
        (("Y2Nj", "Y2N!"), "secret is not base64url"),
        (("Y2Nj", ""), "secret has 29 bytes"),
        ((":8786", ""), "has no port"),
        ((":8786", ":87x6"), "port '87x6'"),
        ((":8786", ":0"), "port '0'"),
        ((":8786", ":65536"), "port '65536'"),
        (("127.0.0.1", "::1"), "not in brackets"),
        (("127.0.0.1", "ho st"), "host 'ho st'"),
        (("?fp=", "?pf="), "part 'pf'"),
        (("?fp=66", "?fp=6"), "fingerprint is not 64"),
    ],
)
def test_a_wrong_join_string_names_the_part_and_hides_the_secret(
    change: tuple[str, str], part: str
) -> None:
    good = str(JoinString.of(CLIENT, Address("127.0.0.1", 8786), b"f" * 32))
    bad = good.replace(*change, 1)
    assert bad != good
    with pytest.raises(InvalidError, match="not a join string") as caught:
        JoinString.parse(bad)
    assert part in str(caught.value)
    assert "Y2NjY2Nj" not in str(caught.value)


def test_secrets_are_not_in_the_repr() -> None:
    one = JoinString.of(CLIENT, Address("127.0.0.1", 8786))
    assert "cccc" not in repr(one) + repr(CLIENT)
    assert Token.new("client").secret != Token.new("client").secret

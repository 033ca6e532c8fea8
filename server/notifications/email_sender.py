"""Sends one message by e-mail through the SMTP server in the settings."""

from __future__ import annotations

import asyncio
import json
import smtplib
import ssl
from concurrent.futures import Executor
from dataclasses import dataclass
from email.message import EmailMessage
from email.utils import formatdate
from urllib.parse import unquote, urlsplit

from server.notifications.http_sender import DeliveryOutcome
from server.notifications.messages import Message
from zeta_core.contract.printable import printable
from zeta_core.contract.webhooks import email_of
from zeta_core.system.exposure import is_loopback

MAX_SUBJECT_CHARACTERS = 150


@dataclass(frozen=True)
class SmtpServer:
    """An SMTP server. ``is_tls``: TLS from the start; otherwise STARTTLS, if the server offers it."""

    host: str
    port: int
    is_tls: bool
    user: str | None
    password: str | None

    @classmethod
    def parse(cls, url: str) -> SmtpServer:
        """The server of a URL ``smtp://[user:password@]host[:port]`` or ``smtps://...``, which the settings checked."""
        parts = urlsplit(url)
        is_tls = parts.scheme == "smtps"
        return cls(
            host=parts.hostname or "",
            port=parts.port or (465 if is_tls else 587),
            is_tls=is_tls,
            user=unquote(parts.username) if parts.username else None,
            password=unquote(parts.password) if parts.password else None,
        )


class EmailSender:
    def __init__(self, url: str | None, sender: str | None, limit_seconds: float, executor: Executor) -> None:
        """``url`` and ``sender`` are ``None`` if no SMTP server is configured."""
        self._server = SmtpServer.parse(url) if url is not None else None
        self._sender = sender
        self._limit_seconds = limit_seconds
        self._executor = executor

    async def send(self, message: Message) -> DeliveryOutcome:
        """Send the message once. Failures are outcomes, not exceptions."""
        if self._server is None or self._sender is None:
            return DeliveryOutcome("e-mail is not configured (ZETA_SMTP_URL, ZETA_SMTP_FROM)")
        email = _email(message, self._sender)
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._executor, self._deliver, self._server, email)
        except smtplib.SMTPResponseException as error:
            return DeliveryOutcome(f"the SMTP server responded: {error.smtp_code} {_text(error.smtp_error)}")
        except smtplib.SMTPRecipientsRefused as error:
            (code, text), *_ = error.recipients.values()
            return DeliveryOutcome(f"the SMTP server refused the recipient: {code} {_text(text)}")
        except (OSError, smtplib.SMTPException) as error:
            return DeliveryOutcome(f"the SMTP server cannot be used: {error or type(error).__name__}")
        return DeliveryOutcome()

    def _deliver(self, server: SmtpServer, email: EmailMessage) -> None:
        context = ssl.create_default_context()
        if server.is_tls:
            smtp = smtplib.SMTP_SSL(server.host, server.port, timeout=self._limit_seconds, context=context)
        else:
            smtp = smtplib.SMTP(server.host, server.port, timeout=self._limit_seconds)
        with smtp:
            if not server.is_tls:
                smtp.ehlo()
                if smtp.has_extn("starttls"):
                    smtp.starttls(context=context)
                elif server.user is not None and not is_loopback(server.host):
                    raise smtplib.SMTPException("it offers no TLS, so the password is not sent; use smtps://")
            if server.user is not None:
                smtp.login(server.user, server.password or "")
            smtp.send_message(email)


def _email(message: Message, sender: str) -> EmailMessage:
    """The e-mail of a message. Its Message-ID is the same in every attempt, so mail programs show it once."""
    email = EmailMessage()
    subject = printable(message.text)
    short = subject if len(subject) <= MAX_SUBJECT_CHARACTERS else f"{subject[: MAX_SUBJECT_CHARACTERS - 1]}…"
    email["Subject"] = short
    email["From"] = sender
    email["To"] = email_of(message.url)
    email["Date"] = formatdate(localtime=False)
    email["Message-ID"] = f"<{message.id}@{sender.rpartition('@')[2]}>"
    email["Auto-Submitted"] = "auto-generated"
    details = json.dumps(message.body, indent=2, ensure_ascii=False)
    email.set_content(printable(f"{message.text}\n\n{details}\n", keep="\n"))
    return email


def _text(value: bytes | str) -> str:
    return printable(value.decode("utf-8", "replace") if isinstance(value, bytes) else value)[:200]

"""Elements that an operator adds to the domain's XML.  Pure.

They are parsed (no entities, no DTD, no network), must be of a kind that adds something, and may not touch what
the provider owns: identity, memory, disks, network, labels.  libvirt's schema judges the whole afterwards.
"""

from __future__ import annotations

from lxml import etree

#: Elements that go under <domain>; one that is there already is replaced.
DOMAIN = frozenset(
    {
        "cpu",
        "clock",
        "features",
        "iothreads",
        "iothreadids",
        "memoryBacking",
        "numatune",
        "pm",
        "sysinfo",
        "keywrap",
    }
    | {"launchSecurity", "perf", "blkiotune", "genid"}
)
#: Elements that go under <devices>.
DEVICES = frozenset(
    {"hostdev", "rng", "tpm", "watchdog", "video", "graphics", "input", "sound", "audio", "controller", "iommu"}
    | {"shmem", "smartcard", "hub", "redirdev", "filesystem", "channel", "memory", "crypto"}
)
_LARGEST = 16 * 1024


def parse(text: str) -> etree._Element:
    """Return the element that `text` is.

    :raises ValueError: it is not exactly one well-formed element of a kind that may be added.
    """
    if len(text) > _LARGEST:
        raise ValueError(f"at most {_LARGEST} characters of XML")
    parser = etree.XMLParser(
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        huge_tree=False,
        remove_comments=True,
        remove_pis=True,
    )
    try:
        element = etree.fromstring(text, parser)
    except (etree.XMLSyntaxError, ValueError) as error:
        raise ValueError(f"one well-formed XML element ({error})") from error
    if "<!DOCTYPE" in text:
        raise ValueError("an XML element without a document type")
    for inner in element.iter():
        if not isinstance(inner.tag, str) or inner.tag.startswith("{"):
            raise ValueError("plain XML elements, without namespaces and entities")
    if element.tag not in DOMAIN | DEVICES:
        raise ValueError(
            f"an element of the domain that may be added, not <{element.tag}>: one of "
            + ", ".join(sorted(DOMAIN | DEVICES))
        )
    return element


def apply(domain: etree._Element, texts: list[str]) -> None:
    """Add elements to a domain in place.

    :raises ValueError: as `parse`.
    """
    devices = domain.find("devices")
    if devices is None:
        raise ValueError("a domain with devices")
    for text in texts:
        element = parse(text)
        element.tail = None
        if element.tag in DEVICES:
            devices.append(element)
            continue
        known = domain.find(element.tag)
        if known is None:
            devices.addprevious(element)
        else:
            domain.replace(known, element)

"""XML: built from values, and parsed where it comes from libvirt or from an operator."""

from __future__ import annotations

from lxml import etree

#: Elements that an operator may add under <domain>; an existing one is replaced.
DOMAIN_ELEMENTS = frozenset(
    {"cpu", "clock", "features", "iothreads", "iothreadids", "memoryBacking", "numatune", "pm", "sysinfo"}
    | {"keywrap", "launchSecurity", "perf", "blkiotune", "genid"}
)
#: Elements that an operator may add under <devices>.
DEVICE_ELEMENTS = frozenset(
    {"hostdev", "rng", "tpm", "watchdog", "video", "graphics", "input", "sound", "audio", "controller", "iommu"}
    | {"shmem", "smartcard", "hub", "redirdev", "filesystem", "channel", "memory", "crypto"}
)
_MAX_EXTRA = 16 * 1024  # characters of one added element


def element(tag: str, *content: object, **attributes: object) -> etree._Element:
    """Return an element.

    :param content: child elements, and values that become its text; None is left out.
    """
    made = etree.Element(tag, {name: str(value) for name, value in attributes.items()})
    for one in content:
        if etree.iselement(one):
            made.append(one)
        elif one is not None:
            made.text = str(one)
    return made


def parse_xml(text: str) -> etree._Element:
    """Return the root element of a document, parsed without entities, DTD and network.

    :raises ValueError: it is not well-formed.
    """
    parser = etree.XMLParser(
        resolve_entities=False, no_network=True, load_dtd=False, remove_comments=True, remove_pis=True
    )
    try:
        return etree.fromstring(text, parser)
    except etree.XMLSyntaxError as error:
        raise ValueError(f"not well-formed XML: {error}") from error


def parse_extra(text: str) -> etree._Element:
    """Return an element that an operator adds to the domain.

    The provider's own subjects stay out: identity, memory, disks, network, labels.  libvirt checks the whole
    against its schema.

    :raises ValueError: it is not exactly one well-formed element of an allowed kind.
    """
    if len(text) > _MAX_EXTRA:
        raise ValueError(f"at most {_MAX_EXTRA} characters of XML")
    try:
        element = parse_xml(text)
    except ValueError as error:
        raise ValueError(f"one well-formed XML element ({error})") from error
    if "<!DOCTYPE" in text:
        raise ValueError("an XML element without a document type")
    for inner in element.iter():
        if not isinstance(inner.tag, str) or inner.tag.startswith("{"):
            raise ValueError("plain XML elements, without namespaces and entities")
    if element.tag not in DOMAIN_ELEMENTS | DEVICE_ELEMENTS:
        allowed = ", ".join(sorted(DOMAIN_ELEMENTS | DEVICE_ELEMENTS))
        raise ValueError(f"an element of the domain that may be added, not <{element.tag}>: one of {allowed}")
    return element

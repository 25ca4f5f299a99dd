"""The rate of an agent's new connections: rules in its own network namespace.

The process that carries its traffic makes a connection of the host for each TCP SYN, flow of datagrams and ICMP
request.  The rules count these without tracking connections: that would take kernel memory for each agent.
"""

from dispatcher.plugin import MAX_CONNECTIONS, NFT_EXCESS

#: For ``nft -f``.  Datagrams are IPv4, as slirp4netns carries no others, and pasta none.
RULES = f"""
table inet dispatcher {{
    set flows {{
        type inet_service . ipv4_addr . inet_service
        size {MAX_CONNECTIONS}
        flags dynamic,timeout
        timeout 2m
    }}
    chain new {{
        type filter hook output priority filter
        oifname "lo" accept
        tcp flags & (syn | ack) != syn accept
        udp sport . ip daddr . udp dport @flows update @flows {{ udp sport . ip daddr . udp dport }} accept
        {NFT_EXCESS} drop
        meta l4proto udp add @flows {{ udp sport . ip daddr . udp dport }} accept
        meta l4proto udp drop
    }}
}}
"""

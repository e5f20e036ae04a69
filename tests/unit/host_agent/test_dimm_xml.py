"""DIMMs in libvirt's XML."""

import xml.etree.ElementTree as ET

from hintfleet.ranges import RangeSet
from hintfleet.units import MIB
from host_agent.guests.libvirt.dimm_xml import dimm_xml, dimms_of

# As libvirt 9.0 shows a running domain.
LIVE = """
<domain type='qemu' id='3'>
  <memory unit='KiB'>1310720</memory>
  <devices>
    <memory model='dimm' access='shared'>
      <target>
        <size unit='KiB'>262144</size>
        <node>0</node>
      </target>
      <alias name='dimm0'/>
      <address type='dimm' slot='0' base='0x100000000'/>
    </memory>
    <memory model='virtio-mem'>
      <target>
        <size unit='KiB'>262144</size>
        <node>0</node>
        <block unit='KiB'>2048</block>
        <requested unit='KiB'>0</requested>
        <current unit='KiB'>0</current>
      </target>
      <alias name='virtiomem0'/>
      <address type='pci' domain='0x0000' bus='0x01' slot='0x00' function='0x0'/>
    </memory>
  </devices>
</domain>
"""


def test_the_dimms_of_a_domain() -> None:
    (dimm,) = dimms_of(LIVE)
    assert dimm.alias == "dimm0"
    assert dimm.address == 4 << 30
    assert dimm.size_bytes == 256 * MIB
    assert dimm.pages == RangeSet([(1 << 20, 1 << 16)])
    assert ET.fromstring(dimm.xml).find("alias") is not None  # noqa: S314 - our own


def test_a_dimm_is_shared_memory_of_a_node() -> None:
    made = ET.fromstring(dimm_xml(128 * MIB, 1))  # noqa: S314 - our own
    assert made.attrib == {"model": "dimm", "access": "shared"}
    assert made.findtext("target/size") == str(128 * MIB)
    assert made.findtext("target/node") == "1"

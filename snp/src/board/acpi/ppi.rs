// SPDX-License-Identifier: Apache-2.0
//! How a guest asks for what firmware should do to its TPM: the physical-presence methods of the TPM's ACPI
//! device.
//!
//! TCG PC Client Platform Physical Presence Interface Specification 1.30, section 6: function numbers of
//! `_DSM`, their arguments and answers. The method only moves numbers between its caller and a few registers;
//! what an operation means is decided behind them.

use acpi_tables::Aml;
use acpi_tables::AmlSink;
use acpi_tables::aml;

/// Identifies the interface among those that a `_DSM` may have.
const INTERFACE: &str = "3dddfaa6-361b-4eb4-a424-8d10089d1653";
/// The version that function 1 answers.
const VERSION: &str = "1.3";
/// Functions 0 to 8, as bits.
const FUNCTIONS: [u8; 2] = [0xff, 0x01];
/// What leads to an operation: a reboot.
const REBOOT: u8 = 2;
/// Function 6, which was withdrawn, answers this.
const NO_LANGUAGE: u8 = 3;

/// The registers as the method calls them, in the order of their addresses.
const REGISTERS: [&str; 6] = ["PPRQ", "PPLA", "PPRE", "PPQU", "PPAR", "PPOU"];

/// One function of the method: the body that runs if the third argument is `number`.
fn function(number: u8, body: Vec<&dyn Aml>, sink: &mut dyn AmlSink) {
    aml::If::new(&aml::Equal::new(&aml::Arg(2), &number), body).to_aml_bytes(sink);
}

/// The body of the method for our interface.
struct Functions;

impl Aml for Functions {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let [request, last, response, query, argument, outcome] =
            REGISTERS.map(|name| -> aml::Path { name.into() });
        let (pair, triple): (aml::Path, aml::Path) = ("PPP2".into(), "PPP3".into());
        // The first member of the package that is the fourth argument.
        let first = aml::Index::new(&aml::ZERO, &aml::Arg(3), &0u8);
        let operation = aml::DeRefOf::new(&first);
        let fetch = aml::Store::new(&aml::Local(0), &operation);

        function(0, vec![&aml::Return::new(&aml::BufferData::new(FUNCTIONS.to_vec()))], sink);
        function(1, vec![&aml::Return::new(&VERSION)], sink);
        // The older form of a request has no argument, and callers of the newer one may leave it out.
        let second = aml::Index::new(&aml::ZERO, &aml::Arg(3), &1u8);
        let given = aml::DeRefOf::new(&second);
        let members = aml::SizeOf::new(&aml::Arg(3));
        let more = aml::GreaterThan::new(&members, &1u8);
        for number in [2, 7] {
            function(
                number,
                vec![
                    &fetch,
                    &aml::Store::new(&argument, &aml::ZERO),
                    &aml::If::new(&more, vec![&aml::Store::new(&argument, &given)]),
                    &aml::Store::new(&request, &aml::Local(0)),
                    &aml::Store::new(&aml::Local(1), &outcome),
                    &aml::Return::new(&aml::Local(1)),
                ],
                sink,
            );
        }
        let slot = aml::Index::new(&aml::ZERO, &pair, &1u8);
        function(3, vec![&aml::Store::new(&slot, &request), &aml::Return::new(&pair)], sink);
        function(4, vec![&aml::Return::new(&REBOOT)], sink);
        let (at_last, at_response) =
            (aml::Index::new(&aml::ZERO, &triple, &1u8), aml::Index::new(&aml::ZERO, &triple, &2u8));
        let answer = [aml::Store::new(&at_last, &last), aml::Store::new(&at_response, &response)];
        function(5, vec![&answer[0], &answer[1], &aml::Return::new(&triple)], sink);
        function(6, vec![&aml::Return::new(&NO_LANGUAGE)], sink);
        let ask = aml::Store::new(&query, &aml::Local(0));
        function(
            8,
            vec![&fetch, &ask, &aml::Store::new(&aml::Local(1), &query), &aml::Return::new(&aml::Local(1))],
            sink,
        );
    }
}

/// What the TPM's device gets: the registers at `base`, and the method.
pub(super) fn methods(base: u32) -> Vec<u8> {
    let mut out = Vec::new();
    aml::OpRegion::new("PPIR".into(), aml::OpRegionSpace::SystemMemory, &base, &24u8).to_aml_bytes(&mut out);
    let fields = REGISTERS.map(|name| {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(name.as_bytes());
        aml::FieldEntry::Named(bytes, 32)
    });
    aml::Field::new(
        "PPIR".into(),
        aml::FieldAccessType::DWord,
        aml::FieldLockRule::NoLock,
        aml::FieldUpdateRule::Preserve,
        fields.to_vec(),
    )
    .to_aml_bytes(&mut out);
    let zeros = |n: usize| aml::Package::new(vec![&0u8 as &dyn Aml; n]);
    aml::Name::new("PPP2".into(), &zeros(2)).to_aml_bytes(&mut out);
    aml::Name::new("PPP3".into(), &zeros(3)).to_aml_bytes(&mut out);
    let interface = aml::Uuid::new(INTERFACE);
    let ours = aml::Equal::new(&aml::Arg(0), &interface);
    let nothing = aml::BufferData::new(vec![0]);
    aml::Method::new(
        "_DSM".into(),
        4,
        true,
        vec![&aml::If::new(&ours, vec![&Functions]), &aml::Return::new(&nothing)],
    )
    .to_aml_bytes(&mut out);
    out
}

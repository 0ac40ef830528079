// SPDX-License-Identifier: Apache-2.0
//! Files of requests: what is left out, what is refused, and by which name.

use super::*;

const SMALLEST: &str = r#"{"boot": {"direct": {"kernel": "bzImage"}}}"#;

#[test]
fn what_is_left_out_has_the_documented_value() {
    let spec = VmSpec::parse(SMALLEST).unwrap();
    assert_eq!((spec.memory, spec.cpus, spec.on_reset), (512 << 20, 1, OnReset::Exit));
    assert!(spec.snp.is_none() && spec.tpm.is_none());
    let BootSpec::Direct(kernel) = &spec.boot else { panic!("{spec:?}") };
    assert_eq!((kernel.initrd.is_none(), kernel.cmdline.as_str()), (true, "console=ttyS0"));
    let snp = VmSpec::parse(r#"{"boot": {"direct": {"kernel": "k"}}, "snp": {}}"#).unwrap().snp.unwrap();
    assert_eq!(snp, SnpSpec::default());
}

#[test]
fn sizes_and_numbers_have_the_forms_of_the_options() {
    let spec = VmSpec::parse(
        r#"{"boot": {"firmware": {"image": "f", "vcpu_model": "EPYC-Milan", "guest_features": "0x21"}}, "memory": "1G",
            "snp": {"policy": "0x30000", "platform": {"emulated": {"pvalidate_2m": "refuse", "product": "turin"}}}}"#,
    )
    .unwrap();
    assert_eq!(spec.memory, 1 << 30);
    let BootSpec::Firmware(firmware) = &spec.boot else { panic!("{spec:?}") };
    assert_eq!((firmware.vcpu_model, firmware.guest_features), (Some(0xa0_0f11), 0x21));
    let plain = SMALLEST.replace("}}}", r#"}}, "memory": 134217728}"#);
    assert_eq!(VmSpec::parse(&plain).unwrap().memory, 128 << 20);
}

#[test]
fn each_contradiction_and_each_unknown_field_is_refused_with_its_path() {
    let state = r#""state": {"file": "v", "key": {"file": "k"}}"#;
    let tpm = |backends: &str| format!(r#""tpm": {{"backend": "t"}}, "backends": {{{backends}}}"#);
    let cases: Vec<(&str, String)> = vec![
        ("boot", r#"{"boot": {"kernel": "k"}}"#.into()),
        (".", r#"{"boot": {"direct": {"kernel": "k"}}} {}"#.into()),
        ("boot.direct.krnel", r#"{"boot": {"direct": {"kernel": "k", "krnel": "k"}}}"#.into()),
        ("boot.direct", r#"{"boot": {"direct": {"cmdline": "c"}}}"#.into()),
        ("boot.firmware", r#"{"boot": {"firmware": {"image": "f"}}}"#.into()),
        ("boot.igvm", r#"{"boot": {"igvm": {"image": "f"}}}"#.into()),
        ("memory", direct(r#""memory": "5parrots""#)),
        ("memory", direct(r#""memory": -1"#)),
        ("cpus", direct(r#""cpus": 17"#)),
        ("cpus", direct(r#""cpus": 0"#)),
        ("cpus", direct(r#""cpus": "two""#)),
        ("disks", direct(r#""disks": []"#)),
        ("snp.policy", direct(r#""snp": {"policy": "30000"}"#)),
        ("snp.host_data", direct(r#""snp": {"host_data": "00"}"#)),
        ("snp.accept", direct(r#""snp": {"accept": "sometimes"}"#)),
        ("snp.accept", direct(r#""snp": {"accept": "eager", "validation": "launch"}"#)),
        ("snp.platform", direct(r#""snp": {"platform": "tdx"}"#)),
        ("snp.platform.emulated.strict", direct(r#""snp": {"platform": {"emulated": {"strict": true}}}"#)),
        ("snp.platform.emulated.stirct", direct(r#""snp": {"platform": {"emulated": {"stirct": true}}}"#)),
        ("snp.secure_tsc", igvm(r#""snp": {"secure_tsc": true}"#)),
        ("snp.platform.emulated.backing", igvm(r#""snp": {"platform": {"emulated": {"backing": "split"}}}"#)),
        // Not backing, which nobody asked for by name: strict brings it along.
        ("snp.platform.emulated.strict", igvm(r#""snp": {"platform": {"emulated": {"strict": true}}}"#)),
        (
            "snp.platform.emulated.strict",
            igvm(r#""snp": {"platform": {"emulated": {"strict": true, "backing": "split"}}}"#),
        ),
        ("tpm.backend", direct(r#""tpm": {"backend": "t"}"#)),
        ("tpm", igvm(&format!(r#""snp": {{}}, {}"#, tpm(r#""t": {"tpm_socket": {"path": "s"}}"#)))),
        ("backends.u", direct(&tpm(r#""t": {"tpm_socket": {"path": "s"}}, "u": {"tpm_service": {}}"#))),
        ("backends.t.tpm_service.state", direct(&tpm(r#""t": {"tpm_service": {"state": {"file": "v"}}}"#))),
        ("on_reset.restart.max_lives", direct(r#""on_reset": {"restart": {"max_lives": 0}}"#)),
    ];
    for (field, json) in cases {
        assert_eq!(VmSpec::parse(&json).unwrap_err().field, field, "{json}");
    }
    let good = direct(&tpm(&format!(r#""t": {{"tpm_service": {{{state}}}}}"#)));
    assert!(VmSpec::parse(&good).is_ok(), "{good}");
}

fn direct(rest: &str) -> String {
    format!(r#"{{"boot": {{"direct": {{"kernel": "k"}}}}, {rest}}}"#)
}

fn igvm(rest: &str) -> String {
    format!(r#"{{"boot": {{"igvm": {{"image": "i"}}}}, {rest}}}"#)
}

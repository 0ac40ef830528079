// SPDX-License-Identifier: Apache-2.0
//! Certificates of a TPM made here, judged by openssl and tpm2-tools.

mod common;

use std::process::Command;

use common::Site;
use common::output;

const SCRIPT: &str = r#"
set -eu
# The places where clients look, each readable by everyone.
tpm2_nvread 0x1c00002 -C 0x1c00002 -o ek-rsa.der
tpm2_nvread 0x1c0000a -C 0x1c0000a -o ek-ecc.der
tpm2_nvread 0x1c101d0 -C 0x1c101d0 -o ak.der
for c in ek-rsa ek-ecc ak; do
    openssl x509 -inform der -in $c.der -out $c.pem
    openssl verify -CAfile ca/ca.pem $c.pem
    openssl x509 -in $c.pem -noout -pubkey >$c.pub
done
openssl x509 -in ek-rsa.pem -noout -text | grep -q '2.23.133.8.1'
openssl x509 -in ek-rsa.pem -noout -text | grep -q '2.23.133.2.1=id:49424D00'
# Each names the VM of the image, as the image's own tool prints it.
for c in ek-rsa ek-ecc ak; do
    openssl x509 -in $c.pem -noout -ext subjectAltName | grep -q "URI:urn:uuid:$VM\b"
done
# Each certificate is for the key that the TPM makes from the standard template.
tpm2_createek -Q -c ek.ctx -G rsa -f pem -u made-rsa.pub; tpm2_flushcontext -t
tpm2_createek -Q -c ek.ctx -G ecc -f pem -u made-ecc.pub; tpm2_flushcontext -t
cmp made-rsa.pub ek-rsa.pub
cmp made-ecc.pub ek-ecc.pub
tpm2_readpublic -Q -c 0x81000003 -f pem -o made-ak.pub
cmp made-ak.pub ak.pub
tpm2_readpublic -Q -c 0x81010001 -f pem -o persistent.pub
cmp persistent.pub ek-rsa.pub
# The attestation key attests.
tpm2_quote -Q -c 0x81000003 -l sha256:0 -q 11 -m q.msg -s q.sig -o q.pcr -g sha256
tpm2_checkquote -Q -u ak.pub -m q.msg -s q.sig -f q.pcr -g sha256 -q 11
# The guest's owner cannot replace a certificate.
if tpm2_nvundefine -Q 0x1c00002 -C o 2>/dev/null; then echo 'the owner removed the EK certificate'; exit 1; fi
tpm2_getcap pcrs | grep -A3 sha1 | head -1
echo CERTIFICATES-GOOD
"#;

#[test]
fn a_new_tpm_has_certificates_that_other_tools_accept() {
    let site = Site::new();
    let (read, text) = site.vmgs(&["inspect", "--json"], &[&site.path("vmgs")]);
    assert!(read, "{text}");
    let (_, vm) = text.split_once("\"vm\": \"").expect("the VM's identity");
    let vm = vm.split('"').next().expect("its end").to_owned();
    assert_eq!(vm.len(), 36, "{vm}");
    let (data, control) = common::neighbouring_ports();
    let ca = site.path("ca").display().to_string();
    let (ctrl, server) = (format!("type=tcp,port={control}"), format!("type=tcp,port={data}"));
    let mut c = common::program();
    c.args(["socket", "--tpm2", "--ctrl", &ctrl, "--server", &server, "--ek-ca", &ca]);
    c.args(["--flags", "not-need-init,startup-clear"]);
    c.arg("--vmgs").arg(site.path("vmgs")).arg("--key-file").arg(site.path("key"));
    c.arg("--anchor").arg(site.path("anchor"));
    let _service = common::serve_tcp(&site, c, data);
    // A running service holds the image; it was looked at before.
    let mut sh = Command::new("timeout");
    sh.env("VM", vm);
    sh.args(["120", "sh", "-c", SCRIPT]).current_dir(site.dir.path());
    let (ok, text) = output(sh.env("TPM2TOOLS_TCTI", format!("swtpm:host=127.0.0.1,port={data}")));
    assert!(ok && text.contains("CERTIFICATES-GOOD"), "{text}\n{}", site.log());
    assert!(site.log().contains("with certificates"), "{}", site.log());
    use std::os::unix::fs::PermissionsExt;
    let mode = std::fs::metadata(site.path("ca/ca-key.pem")).expect("key").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

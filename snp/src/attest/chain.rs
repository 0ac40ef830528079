// SPDX-License-Identifier: Apache-2.0
//! From a report's signing key to a root that the verifier trusts.
//!
//! Chains are ARK → ASK → VCEK (a chip's own key) or ARK → ASVK → VLEK (a key that AMD gives to a cloud
//! provider). AMD's roots of Milan, Genoa and Turin are built in, with the intermediates of their VCEKs. A
//! root from elsewhere, such as the emulated platform's, counts only when the caller names it.

use std::sync::LazyLock;

use super::cert::Cert;
use super::cert::CertError;
use super::cert::Crl;
use super::report::Signer;
use super::tcb::Product;

/// How the name of an authority for VLEKs begins (ASVK), as in `SEV-VLEK-Milan`; that for VCEKs is
/// `SEV-Milan`.
const VLEK_AUTHORITY: &str = "SEV-VLEK-";

/// AMD's certificates: root and VCEK intermediate of each product.
static AMD: LazyLock<Vec<(Product, Vec<Cert>)>> = LazyLock::new(|| {
    [
        (Product::Milan, include_bytes!("roots/milan.pem").as_slice()),
        (Product::Genoa, include_bytes!("roots/genoa.pem").as_slice()),
        (Product::Turin, include_bytes!("roots/turin.pem").as_slice()),
    ]
    .into_iter()
    .map(|(product, pem)| (product, Cert::read_all(pem).unwrap_or_default()))
    .collect()
});

/// AMD's root certificate of `product`.
pub fn amd_root(product: Product) -> Option<&'static Cert> {
    AMD.iter().find(|(p, _)| *p == product).and_then(|(_, certs)| certs.first())
}

/// Whom the verifier believes.
#[derive(Clone, Debug, Default)]
pub struct Trust {
    /// A root in place of AMD's. Reports of the emulated platform have one; it proves nothing about hardware.
    pub other_root: Option<Cert>,
}

impl Trust {
    /// The root that may stand at the end of `product`'s chain.
    pub fn root(&self, product: Product) -> Option<&Cert> {
        self.other_root.as_ref().or_else(|| amd_root(product))
    }
}

/// The certificates between a report and a root.
#[derive(Clone, Debug)]
pub struct Chain<'a> {
    /// VCEK or VLEK.
    pub endorsement: &'a Cert,
    /// ASK or ASVK.
    pub intermediate: Option<&'a Cert>,
    /// The trusted root, from the verifier's side.
    pub root: Option<&'a Cert>,
    /// Where the report comes from, by the endorsement certificate.
    pub product: Product,
    /// Whether the endorsement certificate's key signed the report.
    pub signs: bool,
    /// Whether the intermediate signed the endorsement certificate.
    issued: Result<(), CertError>,
    /// Whether the root is AMD's own.
    amds: bool,
}

/// Which kind of key an endorsement certificate is for.
pub fn kind_of(endorsement: &Cert) -> Signer {
    if endorsement.has_hwid() { Signer::Vcek } else { Signer::Vlek }
}

impl<'a> Chain<'a> {
    /// Puts the chain of the endorsement certificate in `given` together; `signs` says whether a key signed
    /// the report.
    ///
    /// Finding is not checking: see [`Chain::check_signatures`].
    pub fn find(
        given: &'a [Cert],
        trust: &'a Trust,
        signs: impl Fn(&Cert) -> bool,
    ) -> Result<Self, CertError> {
        let candidates = || given.iter().filter(|cert| cert.endorsement_key().is_some() && !cert.is_ca());
        let signer = candidates().find(|cert| signs(cert));
        let endorsement = signer.or_else(|| candidates().next()).ok_or_else(|| CertError::Format {
            what: "certificates",
            reason: "no VCEK or VLEK certificate (with a P-384 key) among those given".into(),
        })?;
        let product = endorsement.product()?;
        let amd = AMD.iter().filter(|(p, _)| *p == product).flat_map(|(_, certs)| certs.iter().skip(1));
        let builtin = amd.filter(|_| trust.other_root.is_none());
        let mut intermediate = None;
        let mut issued = Err(CertError::Format {
            what: "certificates",
            reason: format!(
                "'{}' is issued by '{}', whose certificate is not among those given",
                endorsement.name(),
                endorsement.issuer_name()
            ),
        });
        for cert in given.iter().chain(builtin).filter(|c| endorsement.is_issued_in_the_name_of(c)) {
            intermediate = Some(cert);
            issued = endorsement.check_signed_by(cert);
            if issued.is_ok() {
                break;
            }
        }
        let root = trust.root(product);
        let amds = trust.other_root.is_none();
        Ok(Chain { endorsement, intermediate, root, product, signs: signer.is_some(), issued, amds })
    }

    /// Checks names and signatures from the root down to the endorsement certificate.
    pub fn check_signatures(&self) -> Result<(), CertError> {
        let missing = |reason: String| CertError::Format { what: "certificates", reason };
        let root = self.root.ok_or_else(|| missing(format!("no root for {}", self.product)))?;
        self.issued.clone()?;
        let intermediate = self.intermediate.ok_or_else(|| missing("no intermediate certificate".into()))?;
        for authority in [root, intermediate] {
            if !authority.is_ca() {
                return Err(missing(format!("'{}' may not issue certificates", authority.name())));
            }
        }
        for cert in [root, intermediate, self.endorsement] {
            if let Some(oid) = cert.unknown_critical() {
                return Err(missing(format!(
                    "'{}' has the critical extension {oid}, which is not known",
                    cert.name()
                )));
            }
        }
        if intermediate.is_same_authority(root) {
            return Err(missing(format!(
                "'{}' is signed by the root itself, expected an ASK or ASVK between them",
                self.endorsement.name()
            )));
        }
        // The root counts the certificates between itself and the last one (RFC 5280, 4.2.1.9): one here.
        if root.path_length() == Some(0) {
            return Err(missing(format!("'{}' allows no intermediate certificate", root.name())));
        }
        if self.amds {
            self.check_amds_habits(root, intermediate)?;
        }
        // The root's own signature says nothing: it is believed because the verifier has it, not because it
        // vouches for itself.
        if !intermediate.is_issued_in_the_name_of(root) {
            return Err(CertError::NotSigned {
                subject: intermediate.name(),
                issuer: root.name(),
                reason: format!("it is issued by '{}'", intermediate.issuer_name()),
            });
        }
        intermediate.check_signed_by(root)
    }

    /// What every chain of AMD's has (57230, chapter 3): authorities with RSA keys, and an intermediate for
    /// each kind of key.
    fn check_amds_habits(&self, root: &Cert, intermediate: &Cert) -> Result<(), CertError> {
        let odd = |reason: String| CertError::Format { what: "certificates", reason };
        if let Some(authority) = [root, intermediate].into_iter().find(|cert| !cert.has_rsa_key()) {
            return Err(odd(format!("'{}' has no RSA key, as AMD's authorities have", authority.name())));
        }
        let for_vleks = intermediate.name().starts_with(VLEK_AUTHORITY);
        let kind = kind_of(self.endorsement);
        if for_vleks != (kind == Signer::Vlek) {
            return Err(odd(format!(
                "'{}' is issued by '{}', which issues {}s",
                self.endorsement.name(),
                intermediate.name(),
                if for_vleks { "VLEK" } else { "VCEK" }
            )));
        }
        Ok(())
    }

    /// The certificate that is not valid at `now` (seconds since 1970), if any.
    pub fn outdated(&self, now: u64) -> Option<&'a Cert> {
        let certs = [Some(self.endorsement), self.intermediate, self.root];
        certs.into_iter().flatten().find(|cert| {
            let (from, to) = cert.validity();
            now < from || now > to
        })
    }

    /// Checks `list`, which has to be the root's, and whether it revokes a certificate of this chain; the
    /// error says what is wrong.
    pub fn check_revocation(&self, list: &Crl, now: u64) -> Result<(), String> {
        // A list by the intermediate says nothing about the intermediate itself.
        let root = self.root.ok_or_else(|| format!("no root for {}", self.product))?;
        list.check_signed_by(root).map_err(|error| match error {
            CertError::NotSigned { reason, .. } if reason.starts_with("it is issued by") => {
                format!(
                    "the list is issued by '{}', expected the root's, '{}'",
                    list.issuer_name(),
                    root.name()
                )
            }
            CertError::NotSigned { reason, .. } => {
                format!("the list is not signed by '{}': {reason}", root.name())
            }
            other => other.to_string(),
        })?;
        let (made, due) = list.period();
        // RFC 5280, section 5.1.2.5: the date of the next list must be there. Without it a list would count
        // for ever.
        let due = due.ok_or("the list does not say when the next one is due")?;
        if now < made || now > due {
            return Err("the list is not current: fetch a new one".into());
        }
        let certs = [Some(self.endorsement), self.intermediate, self.root].into_iter().flatten();
        match certs.filter(|cert| cert.shares_issuer_with(list)).find(|cert| cert.is_revoked_by(list)) {
            Some(cert) => Err(format!("'{}' is revoked", cert.name())),
            None => Ok(()),
        }
    }
}

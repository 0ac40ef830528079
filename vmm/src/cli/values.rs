// SPDX-License-Identifier: Apache-2.0
//! How the command line writes values of a request, and what its help says of each.

use clap::ValueEnum;
use clap::builder::PossibleValue;

use crate::spec::Accept;
use crate::spec::Backing;
use crate::spec::EmulatedProduct;
use crate::spec::Pvalidate2m;
use crate::spec::Validation;
use crate::spec::ZeroPages;

macro_rules! values {
    ($($kind:ident { $($variant:ident $name:literal $help:literal)* })*) => {$(
        impl ValueEnum for $kind {
            fn value_variants<'a>() -> &'a [Self] {
                &[$(Self::$variant,)*]
            }

            fn to_possible_value(&self) -> Option<PossibleValue> {
                Some(match self {
                    $(Self::$variant => PossibleValue::new($name).help($help),)*
                })
            }
        }
    )*};
}

values! {
    Accept {
        Eager "eager" "All of it"
        Lazy "lazy" "What the kernel needs to start; it validates the rest when it needs it (Linux 6.6 and later)"
        Auto "auto" "Lazy for more than 2 GiB if the kernel can do it"
    }
    Validation {
        Stage0 "stage0" "The measured shim"
        Launch "launch" "The launch, one firmware command for each 4 KiB"
    }
    ZeroPages {
        Normal "normal" "NORMAL pages of zeros, as the IGVM specification says"
        Zero "zero" "Type ZERO, as QEMU and Cloud Hypervisor load them"
    }
    Backing {
        Single "single" "One memory: fast, finds no access through the wrong view"
        Split "split" "One for each view: finds them, takes up to twice the memory"
    }
    Pvalidate2m {
        Refuse "refuse" "Size mismatch, as a Linux 6.12 host answers: its RMP entries are all 4 KiB"
        Accept "accept" "Done at once"
    }
    EmulatedProduct {
        Milan "milan" "EPYC 7003"
        Genoa "genoa" "EPYC 9004, whose firmware AMD has published"
        Turin "turin" "EPYC 9005"
        Host "host" "This host's own, whatever it is"
    }
}

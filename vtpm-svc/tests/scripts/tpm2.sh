#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# What a user of tpm2-tools does, in the working directory, against the TPM that TPM2TOOLS_TCTI names.
# Prints one line per step; the first step that fails ends the script.
set -eu
step() { echo "ok: $1"; }
flush() { tpm2_flushcontext -t >/dev/null 2>&1 || true; }

tpm2_getrandom --hex 16 >/dev/null; step getrandom
tpm2_createprimary -Q -C o -g sha256 -G ecc -c primary.ctx; step createprimary
flush
tpm2_create -Q -C primary.ctx -g sha256 -G rsa2048:rsassa:null -a 'fixedtpm|fixedparent|sensitivedataorigin|userwithauth|sign' \
    -u key.pub -r key.priv; step create
flush
tpm2_load -Q -C primary.ctx -u key.pub -r key.priv -c key.ctx; step load
flush
echo message >message
tpm2_sign -Q -c key.ctx -g sha256 -o message.sig message; step sign
flush
tpm2_verifysignature -Q -c key.ctx -g sha256 -m message -s message.sig; step verify
flush

# Seal to a PCR, unseal, extend the PCR, fail to unseal.
tpm2_pcrreset -Q 16
tpm2_startauthsession -S trial.ctx
tpm2_policypcr -Q -S trial.ctx -l sha256:16 -L pcr.policy
tpm2_flushcontext trial.ctx
printf 'the sealed secret' | tpm2_create -Q -C primary.ctx -L pcr.policy -i - -u seal.pub -r seal.priv
flush
tpm2_load -Q -C primary.ctx -u seal.pub -r seal.priv -c seal.ctx; step seal
flush
test "$(tpm2_unseal -c seal.ctx -p pcr:sha256:16)" = 'the sealed secret'; step unseal
flush
tpm2_pcrextend 16:sha256=0101010101010101010101010101010101010101010101010101010101010101
if tpm2_unseal -c seal.ctx -p pcr:sha256:16 >/dev/null 2>&1; then echo 'unsealed with the wrong PCR'; exit 1; fi
step 'no unseal with another PCR'
flush

tpm2_nvdefine -Q 0x1500010 -C o -s 32 -a 'ownerread|ownerwrite|authread|authwrite'
printf '0123456789abcdef0123456789abcdef' | tpm2_nvwrite -Q 0x1500010 -C o -i -
test "$(tpm2_nvread 0x1500010 -C o)" = '0123456789abcdef0123456789abcdef'; step 'NV write and read'
tpm2_nvdefine -Q 0x1500011 -C o -a 'ownerread|ownerwrite|nt=counter'
tpm2_nvincrement -Q 0x1500011 -C o
first=$(tpm2_nvread 0x1500011 -C o | od -An -tx1 | tr -d ' ')
tpm2_nvincrement -Q 0x1500011 -C o
second=$(tpm2_nvread 0x1500011 -C o | od -An -tx1 | tr -d ' ')
test $((0x$second)) -eq $((0x$first + 1)); step 'NV counter'

tpm2_createek -Q -c ek.ctx -G rsa -u ek.pub
flush
tpm2_createak -Q -C ek.ctx -c ak.ctx -G rsa -g sha256 -s rsassa -u ak.pub -f pem -n ak.name
flush
tpm2_quote -Q -c ak.ctx -l sha256:0,16 -q 0123abcd -m quote.msg -s quote.sig -o quote.pcrs -g sha256
flush
tpm2_checkquote -Q -u ak.pub -m quote.msg -s quote.sig -f quote.pcrs -g sha256 -q 0123abcd; step 'quote and checkquote'
flush
if tpm2_checkquote -Q -u ak.pub -m quote.msg -s quote.sig -f quote.pcrs -g sha256 -q 0123abce >/dev/null 2>&1; then
    echo 'a quote with another nonce was accepted'; exit 1
fi

tpm2_evictcontrol -Q -C o -c key.ctx 0x81010050
flush
tpm2_sign -Q -c 0x81010050 -g sha256 -o message.sig message
tpm2_evictcontrol -Q -C o -c 0x81010050; step evictcontrol
flush

# Dictionary attack: two wrong guesses lock, the lockout hierarchy clears.
tpm2_dictionarylockout -Q --setup-parameters --max-tries=2 --recovery-time=1000 --lockout-recovery-time=1000
tpm2_create -Q -C primary.ctx -p right -i message -u da.pub -r da.priv
flush
tpm2_load -Q -C primary.ctx -u da.pub -r da.priv -c da.ctx
flush
for guess in wrong1 wrong2; do
    if tpm2_unseal -c da.ctx -p $guess >/dev/null 2>&1; then echo 'wrong password accepted'; exit 1; fi
    flush
done
if tpm2_unseal -c da.ctx -p right >/dev/null 2>&1; then echo 'no lockout after two wrong guesses'; exit 1; fi
flush
tpm2_dictionarylockout -Q --clear-lockout
test "$(tpm2_unseal -c da.ctx -p right)" = message; step 'dictionary-attack lockout'
flush
echo 'all steps passed'

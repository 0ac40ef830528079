// SPDX-License-Identifier: Apache-2.0
//! The MC146818 real-time clock of a PC: time of day, read-only.
//!
//! Registers as in the MC146818 data sheet; the century in 0x32 as ACPI's FADT may say. Time is the host's, in UTC, BCD and
//! 24-hour mode. Alarms and periodic interrupts do not exist: the guest has better timers.

use std::time::SystemTime;
use std::time::UNIX_EPOCH;

use crate::bus::Action;
use crate::bus::Device;

/// Index port; data is the port after it.
pub const PORT: u64 = 0x70;
/// Ports that it takes.
pub const LEN: u64 = 2;
/// Register that holds the century.
pub const CENTURY_REGISTER: u8 = 0x32;

/// Status A: 32.768 kHz time base, no update in progress.
const STATUS_A: u8 = 0x26;
/// Status B: 24-hour mode, BCD.
const STATUS_B: u8 = 0x02;
/// Status D: the clock has power.
const STATUS_D: u8 = 0x80;

/// The clock.
pub struct Rtc {
    index: u8,
    now: fn() -> SystemTime,
    cmos: [u8; 128],
}

impl Default for Rtc {
    fn default() -> Self {
        Rtc { index: 0, now: SystemTime::now, cmos: [0; 128] }
    }
}

/// A moment in UTC.
struct Civil {
    year: u64,
    month: u8,
    day: u8,
    weekday: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

/// Splits seconds since 1970 by the Gregorian calendar. The year is taken to start in March, so that the leap day is its
/// last day, and counted in cycles of 400 years, which all have 146,097 days.
fn civil(seconds: u64) -> Civil {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Day 0 of the count is 0000-03-01, which is 719,468 days before 1970-01-01.
    let count = days + 719_468;
    let (cycle, day_of_cycle) = (count / 146_097, count % 146_097);
    let year_of_cycle =
        (day_of_cycle - day_of_cycle / 1_460 + day_of_cycle / 36_524 - day_of_cycle / 146_096) / 365;
    let day_of_year = day_of_cycle - (365 * year_of_cycle + year_of_cycle / 4 - year_of_cycle / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = (day_of_year - (153 * month_from_march + 2) / 5 + 1) as u8;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 } as u8;
    Civil {
        year: cycle * 400 + year_of_cycle + u64::from(month <= 2),
        month,
        day,
        // 1970-01-01 was a Thursday; Sunday is 1.
        weekday: ((days + 4) % 7 + 1) as u8,
        hour: (rest / 3600) as u8,
        minute: (rest / 60 % 60) as u8,
        second: (rest % 60) as u8,
    }
}

fn bcd(n: u8) -> u8 {
    ((n / 10 % 10) << 4) | (n % 10)
}

impl Rtc {
    fn register(&self, index: u8) -> u8 {
        let seconds = (self.now)().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let t = civil(seconds);
        match index {
            0x00 => bcd(t.second),
            0x02 => bcd(t.minute),
            0x04 => bcd(t.hour),
            0x06 => t.weekday,
            0x07 => bcd(t.day),
            0x08 => bcd(t.month),
            0x09 => bcd((t.year % 100) as u8),
            CENTURY_REGISTER => bcd((t.year / 100 % 100) as u8),
            0x0a => STATUS_A,
            0x0b => STATUS_B,
            0x0c => 0,
            0x0d => STATUS_D,
            other => self.cmos.get(usize::from(other)).copied().unwrap_or(0xff),
        }
    }
}

impl Device for Rtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(if offset == 1 { self.register(self.index) } else { 0xff });
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> Option<Action> {
        for &byte in data {
            match offset {
                // Bit 7 masks NMIs on a PC.
                0 => self.index = byte & 0x7f,
                _ => {
                    if let Some(cell) = self.cmos.get_mut(usize::from(self.index)) {
                        *cell = byte;
                    }
                }
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn read(rtc: &mut Rtc, index: u8) -> u8 {
        rtc.write(0, &[index]);
        let mut byte = [0];
        rtc.read(1, &mut byte);
        byte[0]
    }

    #[test]
    fn dates_agree_with_date_1() {
        // Expected values: `date -u -d @SECONDS +%F\ %T\ %u` of GNU coreutils.
        for (seconds, expected) in [
            (0, (1970, 1, 1, 0, 0, 0, 5)),
            (951_782_399, (2000, 2, 28, 23, 59, 59, 2)),
            (951_782_400, (2000, 2, 29, 0, 0, 0, 3)),
            (1_735_689_599, (2024, 12, 31, 23, 59, 59, 3)),
            (4_107_542_400, (2100, 3, 1, 0, 0, 0, 2)),
        ] {
            let t = civil(seconds);
            assert_eq!((t.year, t.month, t.day, t.hour, t.minute, t.second, t.weekday), expected);
        }
    }

    #[test]
    fn registers_are_bcd_in_24_hour_mode() {
        let mut rtc = Rtc { now: || UNIX_EPOCH + Duration::from_secs(1_735_689_599), ..Rtc::default() };
        let time: Vec<u8> =
            [0x32, 9, 8, 7, 4, 2, 0].into_iter().map(|register| read(&mut rtc, register)).collect();
        assert_eq!(time, [0x20, 0x24, 0x12, 0x31, 0x23, 0x59, 0x59]);
        assert_eq!(read(&mut rtc, 0x0b) & 0x06, 0x02);
        assert_eq!(read(&mut rtc, 0x0d), 0x80);
    }
}

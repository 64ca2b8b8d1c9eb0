import EdgeStreamKit
import Testing

@Suite struct UTF8AssemblerTests {
    static let text = "é ñ ß 漢字かな 한국어 😀 👩‍👩‍👧‍👦 🇪🇸 👍🏽 \u{10FFFF} \u{0} end"

    @Test(arguments: 1...5)
    func charactersSplitOverPieces(pieceLength: Int) {
        let bytes = Array(Self.text.utf8)
        var assembler = UTF8Assembler()
        var text = ""
        var i = 0
        while i < bytes.count {
            let piece = assembler.append(bytes[i..<min(i + pieceLength, bytes.count)])
            #expect(!piece.unicodeScalars.contains("\u{FFFD}"))
            text += piece
            i += pieceLength
        }
        #expect(text == Self.text)
        #expect(!assembler.isWaiting && assembler.finish() == "")
    }

    @Test func aCharacterWaitsForItsLastByte() {
        var assembler = UTF8Assembler()
        #expect(assembler.append([0xF0]) == "" && assembler.isWaiting)
        #expect(assembler.append([0x9F, 0x98]) == "")
        #expect(assembler.append([0x80, 0x41]) == "😀A" && !assembler.isWaiting)
    }

    /// Whatever the bytes and however they are split, the text is that of all of them at once, and at most three wait.
    @Test func anyBytesInAnyPieces() {
        var random = SystemRandomNumberGenerator()
        let interesting: [UInt8] = [
            0x41, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC2, 0xDF, 0xE0, 0xED, 0xEF, 0xF0, 0xF4, 0xF5, 0xFF,
        ]
        for _ in 0..<2000 {
            let bytes = (0..<12).map { _ in interesting.randomElement(using: &random)! }
            var assembler = UTF8Assembler()
            var text = ""
            var rest = bytes[...]
            while !rest.isEmpty {
                let n = Int.random(in: 1...min(4, rest.count), using: &random)
                text += assembler.append(rest.prefix(n))
                rest = rest.dropFirst(n)
            }
            text += assembler.finish()
            #expect(Array(text.unicodeScalars) == Array(String(decoding: bytes, as: UTF8.self).unicodeScalars), "\(bytes)")
        }
    }
}

@testable import ChatCore
import Testing

@Suite struct ChatStateTests {
    private func opened() -> ChatState {
        var state = ChatState()
        state.apply(.loading(0.5))
        #expect(state.isBusy && !state.canSend)
        state.apply(.opened(transcript: [(.user, "Hello"), (.assistant, "Hi")], dropped: 3))
        return state
    }

    @Test func aTurn() {
        var state = opened()
        #expect(state.canSend && state.canRegenerate && state.droppedCount == 3)
        state.apply(.said("How are you?"))
        #expect(state.phase == .reading(done: 0, total: 0) && !state.canSend && !state.canRegenerate)
        state.apply(.reading(done: 5, total: 9))
        state.apply(.wrote("Fi"))
        state.apply(.reading(done: 9, total: 9))  // late
        #expect(state.phase == .writing)
        state.apply(.wrote("ne."))
        state.apply(.ended(isCut: false))
        #expect(state.messages.map(\.text) == ["Hello", "Hi", "How are you?", "Fine."])
        #expect(Set(state.messages.map(\.id)).count == 4 && state.phase == .idle)
        state.apply(.wrote("too late"))
        #expect(state.messages.last?.text == "Fine.")
    }

    @Test func cutRegeneratedAndTakenBack() {
        var state = opened()
        state.apply(.said("Count"))
        state.apply(.wrote("1 2"))
        state.apply(.ended(isCut: true))
        #expect(state.messages.last?.isCut == true)
        state.apply(.regenerating)
        #expect(state.messages.last?.text == "" && state.messages.last?.isCut == false && state.messages.count == 4)
        state.apply(.ended(isCut: false))
        state.apply(.said("Never read"))
        state.apply(.tookBack)
        #expect(state.messages.count == 4 && state.messages.last?.role == .assistant)
    }

    @Test func suspended() {
        var state = opened()
        state.apply(.suspended(.memory))
        #expect(state.canSend && state.messages.count == 2)  // saying something wakes it up
        state.apply(.suspended(.background))
        #expect(!state.canSend)
        state.apply(.closed)
        #expect(state == ChatState())
        state.apply(.noticed(.failure("No space")))
        state.apply(.closed)
        #expect(state.phase == .noModel && state.notice == .failure("No space"))
    }

    @Test func theScreenIsBoundedAsTheStreamIs() {
        var state = opened()
        let long = String(repeating: "x", count: 100_000)
        for _ in 0..<50 {
            state.apply(.said("Go on"))
            state.apply(.wrote(long))
            state.apply(.ended(isCut: false))
        }
        #expect(state.messages.map(\.text.utf8.count).reduce(0, +) <= ChatState.transcriptBytes)
        #expect(state.messages.count + state.droppedCount == 3 + 102)
        #expect(state.messages.last?.text == long)
    }

    @Test func gauge() {
        var gauge = Gauge()
        #expect(gauge.fill == 0)
        (gauge.cached, gauge.contextSize) = (64, 256)
        #expect(gauge.fill == 0.25)
    }
}
